// Draw images with a bundle's sampler.onnx in Node.
//
//     npm install --ignore-scripts
//     node sampler.mjs BUNDLE --label 3 --seed 0 --out image.ppm
//     node sampler.mjs BUNDLE --ids "[49406, 2368, 49407]" --guidance 5 --out image.ppm
//
// --noise FILE reads raw float32 [count, C, H, W], such as python_sampler.py --save-noise writes, and gives the same
// pixels as Python. --raw FILE writes the pixels as raw float32 [count, height, width, C]; --out writes a PPM or PGM.
// Ids come from a tokenizer, such as npm's @huggingface/transformers with the bundle's tokenizer.json.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import ort from "onnxruntime-node";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    label: { type: "string", default: "0" },
    ids: { type: "string" },
    "negative-ids": { type: "string" },
    guidance: { type: "string" },
    seed: { type: "string", default: "0" },
    count: { type: "string", default: "1" },
    noise: { type: "string" },
    raw: { type: "string" },
    out: { type: "string" },
  },
});

// Standard normal numbers from a seed: mulberry32 and the Box-Muller transform. Not the noise of numpy's seed.
function seededNoise(seed, length) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return Float32Array.from({ length }, normal);
}

function readFloats(file) {
  const bytes = readFileSync(file);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

// The row of one image for an input, as numbers.
function row(name, entry) {
  if (name === "labels") return [Number(options.label)];
  if (name === "guidance") return [Number(options.guidance ?? entry.default)];
  if (!("tokenizer" in entry)) throw new Error(`${name}: this example feeds labels, token ids and guidance alone`);
  const given = options[name.startsWith("uncond_") ? "negative-ids" : "ids"];
  if (given === undefined && entry.default) return entry.default;
  if (given === undefined) throw new Error(`${name}: give --ids`);
  const ids = JSON.parse(given).slice(0, entry.length);
  const [filled, empty] = name.includes("mask") ? [ids.map(() => 1), 0] : [ids, entry.pad];
  return [...filled, ...Array(entry.length - ids.length).fill(empty)];
}

function tensor(name, entry, count) {
  const one = row(name, entry);
  const data = entry.shape.length === 0 ? one : Array(count).fill(one).flat();
  const shape = entry.shape.map((size) => (size === "batch" ? count : size));
  if (entry.dtype === "int64") return new ort.Tensor("int64", BigInt64Array.from(data, BigInt), shape);
  return new ort.Tensor("float32", Float32Array.from(data), shape);
}

const [bundle] = positionals;
const count = Number(options.count);
const { inputs } = JSON.parse(readFileSync(join(bundle, "sampler.json"), "utf8"));
const shape = [count, ...inputs.noise.shape.slice(1)];
const length = shape.reduce((product, size) => product * size, 1);
const noise = options.noise ? readFloats(options.noise) : seededNoise(Number(options.seed), length);

const feed = { noise: new ort.Tensor("float32", noise, shape) };
for (const [name, entry] of Object.entries(inputs)) {
  if (name !== "noise") feed[name] = tensor(name, entry, count);
}
const session = await ort.InferenceSession.create(join(bundle, "sampler.onnx"));
const { images } = await session.run(feed);

if (options.raw) writeFileSync(options.raw, Buffer.from(images.data.buffer, images.data.byteOffset, images.data.byteLength));
if (options.out) {
  // the images below each other
  const [rows, height, width, channels] = images.dims;
  const header = `P${channels === 1 ? 5 : 6}\n${width} ${rows * height}\n255\n`;
  writeFileSync(options.out, Buffer.concat([Buffer.from(header), Buffer.from(images.data.map((v) => Math.round(v * 255)))]));
}
console.log(`images [${images.dims}] from ${bundle}`);
