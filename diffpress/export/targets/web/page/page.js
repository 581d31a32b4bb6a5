// The page: a form, progress, and the images. ?engine=wasm or ?engine=webgpu chooses the engine.

import { openSampler } from "./sampler.js";

const at = (id) => document.getElementById(id);
const fields = at("form").elements, submit = document.querySelector("button[type=submit]");
const engine = new URLSearchParams(location.search).get("engine") ?? undefined;
const NAMES = { webgpu: "WebGPU", wasm: "WASM" };
let sampler = null, count = 0;

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
at("stop").addEventListener("click", () => sampler?.close());
open();

async function open() {
  sampler = null;
  try {
    sampler = await openSampler({ engine, onProgress: ({ text, done, total }) => show(text, total ? done / total : null) });
  } catch (error) {
    at("progress").hidden = true;
    at("error").textContent = error.message;
    return show("The model was not loaded");
  }
  const { inputs, sampling } = sampler.description, { facts } = sampler;
  at("prompt-row").hidden = !("input_ids" in inputs);
  at("negative-row").hidden = !("uncond_input_ids" in inputs);
  at("label-row").hidden = !("labels" in inputs);
  at("guidance-row").hidden = !("guidance" in inputs);
  fields.guidance.placeholder = inputs.guidance?.default ?? "";
  fields.label.max = (inputs.labels?.classes ?? 1) - 1;
  at("classes").textContent = `0 to ${fields.label.max}`;
  const threads = facts.threads === null ? "" : `, ${facts.threads} thread${facts.threads > 1 ? "s" : ""}`;
  at("facts").textContent =
    `${sampling.steps} steps of ${sampling.solver}. ${(facts.bytes / 2 ** 20).toFixed(1)} MiB model, ` +
    `${NAMES[facts.engine]}${threads}, loaded in ${(facts.loadMs / 1000).toFixed(1)} s.`;
  submit.disabled = false;
  at("progress").hidden = true;
  show("Ready");
}

function show(text, share = null) {
  at("status").textContent = text;
  if (share === null) at("progress").removeAttribute("value");
  else at("progress").value = share;
}

async function run() {
  const n = Number(fields.n.value), seed = Number(fields.seed.value), times = [];
  const request = { prompt: fields.prompt.value, negative: fields.negative.value };
  if (fields.guidance.value !== "") request.guidance = Number(fields.guidance.value);
  at("error").textContent = "";
  at("images").replaceChildren();
  submit.disabled = true;
  at("stop").disabled = at("progress").hidden = false;
  try {
    for (let index = 0; index < n; index++) {
      show(`Sampling image ${index + 1} of ${n}`, n > 1 ? index / n : null);
      const label = fields.label.value === "" ? index % (Number(fields.label.max) + 1) : Number(fields.label.value);
      const image = await sampler.sample({ ...request, seed: seed + index, label });
      times.push(image.ms);
      at("images").append(shown(image, alternative({ ...request, label, seed: seed + index })));
    }
    const mean = times.reduce((one, other) => one + other, 0) / n;
    show(`Finished, ${mean.toFixed(0)} ms per image`);
  } catch (error) {
    if (error.message === "stopped") return await open();
    at("error").textContent = error.message;
    show("Sampling failed");
  } finally {
    submit.disabled = sampler === null;
    at("stop").disabled = at("progress").hidden = true;
  }
}

function alternative({ prompt, label, seed }) {
  const what = at("prompt-row").hidden ? (at("label-row").hidden ? "Image" : `Class ${label}`) : prompt || "Image";
  return `${what}, seed ${seed}`;
}

/** Return an <img> of float pixels [height, width, channels] in 0..1, with 1, 3 or 4 channels. */
function shown({ pixels, height, width, channels }, alt) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d"), data = context.createImageData(width, height);
  for (let index = 0; index < width * height; index++) {
    for (let channel = 0; channel < 4; channel++) {
      const source = channels === 1 ? 0 : channel; // grey is repeated
      const value = channel === 3 && channels < 4 ? 1 : pixels[index * channels + source];
      data.data[4 * index + channel] = Math.round(255 * value);
    }
  }
  context.putImageData(data, 0, 0);
  return Object.assign(new Image(width, height), { src: canvas.toDataURL("image/png"), alt, title: alt });
}
