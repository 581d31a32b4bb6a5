// The sampler of a bundle in a browser. It runs in a worker, so that the page stays responsive.
//
//     import { openSampler } from "./sampler.js";
//     const sampler = await openSampler();
//     const { pixels, height, width, channels } = await sampler.sample({ seed: 7, prompt: "a red house" });

import { noiseOf } from "./noise.js";

/**
 * Load the model.
 *
 * engine: "wasm" or "webgpu"; without it WebGPU where there is one, else WASM.
 * onProgress: called with {text, done, total}, in bytes; done and total may be missing.
 *
 * Returns {description, facts, sample, close}: sampler.json, how the model was loaded, and
 *     sample({seed | noise, label, prompt, negative, guidance}) -> {pixels, height, width, channels, ms}
 * with pixels a Float32Array [height, width, channels] in 0..1, and noise a Float32Array [C, H, W] instead of a seed.
 */
export function openSampler({ engine, onProgress = () => {} } = {}) {
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  const waiting = new Map();
  let last = 0, description;

  const sample = ({ seed, noise, ...request }) =>
    new Promise((resolve, reject) => {
      const id = ++last, size = description.inputs.noise.shape.slice(1).reduce((one, other) => one * other, 1);
      const start = noise ?? noiseOf(seed, size);
      if (start.length !== size) throw new Error(`noise has ${start.length} values, the model takes ${size}`);
      waiting.set(id, { resolve, reject });
      worker.postMessage({ kind: "sample", id, noise: start, ...request });
    });
  const close = () => {
    worker.terminate();
    waiting.forEach(({ reject }) => reject(new Error("stopped")));
  };

  return new Promise((resolve, reject) => {
    waiting.set(undefined, { reject });
    worker.onerror = (event) => waiting.forEach((each) => each.reject(new Error(event.message ?? "the worker does not start")));
    worker.onmessage = ({ data: { kind, id, ...rest } }) => {
      if (kind === "progress") return onProgress(rest);
      if (kind === "opened") {
        description = rest.description;
        resolve({ ...rest, sample, close });
      }
      if (kind === "image") waiting.get(id).resolve(rest);
      if (kind === "error") waiting.get(id).reject(new Error(rest.message));
      waiting.delete(id);
    };
    worker.postMessage({ kind: "open", engine });
  });
}
