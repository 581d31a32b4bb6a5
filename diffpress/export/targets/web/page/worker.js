// A worker that loads sampler.onnx into ONNX Runtime Web and samples one image per request.
//
//     in     {kind: "open", engine}    {kind: "sample", id, noise, label, prompt, negative, guidance}
//     out    progress, opened, image, error: see the calls of `send`

import { openTokenizer } from "./tokenizer.js";

const MAX_THREADS = 8;
const GRAPHS = { float32: Float32Array, int64: BigInt64Array };
const here = (name) => new URL(name, import.meta.url).href;
const send = (message, transferred = []) => self.postMessage(message, transferred);

let description, ort, session, tokenizers;

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") await open(data.engine);
    else await sample(data);
  } catch (error) {
    send({ kind: "error", id: data.id, message: `${error?.message ?? error}` });
  }
};

async function open(wanted) {
  const started = performance.now();
  description = await (await found("sampler.json")).json();
  const folders = Object.values(description.inputs).map((entry) => entry.tokenizer).filter(Boolean);
  const files = [...new Set(folders)].map(async (name) => [name, (await found(`${name}/tokenizer.json`)).json()]);
  tokenizers = {};
  for (const [name, file] of await Promise.all(files)) tokenizers[name] = openTokenizer(await file);
  const graph = await downloaded(description.file);
  const downloadMs = performance.now() - started;
  let engine = wanted ?? ((await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm");
  try {
    await start(engine, graph);
  } catch (error) {
    if (wanted || engine === "wasm") throw error;
    send({ kind: "progress", text: `WebGPU does not run this model (${error.message}); starting WASM` });
    await start((engine = "wasm"), graph);
  }
  const threads = engine === "wasm" ? ort.env.wasm.numThreads : null;
  const facts = { engine, threads, bytes: graph.length, downloadMs, loadMs: performance.now() - started };
  send({ kind: "opened", description, facts });
}

async function start(engine, graph) {
  send({ kind: "progress", text: `Starting ${engine === "webgpu" ? "WebGPU" : "WASM"}` });
  ort = await import(here(`ort/ort.${engine}.min.mjs`));
  ort.env.wasm.wasmPaths = here("ort/");
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  session = await ort.InferenceSession.create(graph, { executionProviders: [engine] });
}

async function sample(request) {
  const started = performance.now(), feed = {};
  for (const [name, entry] of Object.entries(description.inputs)) {
    const shape = entry.shape.map((side) => (side === "batch" ? 1 : side));
    feed[name] = new ort.Tensor(entry.dtype, GRAPHS[entry.dtype].from(valuesOf(name, entry, request)), shape);
  }
  const { images } = await session.run(feed);
  const pixels = await images.getData();
  const [, height, width, channels] = images.dims;
  const ms = performance.now() - started;
  send({ kind: "image", id: request.id, pixels, height, width, channels, ms }, [pixels.buffer]);
}

/** Return the values of one input, as sampler.json describes it. */
function valuesOf(name, entry, { noise, label, prompt, negative, guidance }) {
  if (name === "noise") return noise;
  if (name === "labels") return [BigInt(label)];
  if (name === "guidance") return [guidance ?? entry.default];
  const isNegative = name.startsWith("uncond_");
  if (isNegative && !negative) return entry.default.map(BigInt);
  const tokens = tokenizers[entry.tokenizer](isNegative ? negative : prompt, entry.length, entry.pad);
  return name.includes("mask") ? tokens.mask : tokens.ids;
}

async function found(name) {
  const response = await fetch(here(name));
  if (!response.ok) throw new Error(`${name}: status ${response.status}; serve the whole folder`);
  return response;
}

async function downloaded(name) {
  const response = await found(name), total = Number(response.headers.get("content-length")), parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    size += value.length;
    send({ kind: "progress", text: `Loading ${name}`, done: size, total });
  }
}
