// The two towers, in a worker so that the page stays alive while they load and work.
//
// Message in: { id, texts: [string, ...] } or { id, image: ImageData }; out: { id, embeds: [[number, ...], ...] },
// L2-normalised, or { id, error }. Before them come { loading: what }, and then { ready, site } or { error }.

import {
  env, AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
} from './lib/transformers.min.js';
import { resize } from './resize.js';

let tokenizer, processor, textModel, visionModel;

async function load() {
  const site = await (await fetch('site.json', { cache: 'no-cache' })).json();
  // The library and its WebAssembly come from this site, and the model too if it lies here: no other server is asked.
  const lib = new URL('lib/', self.location.href).href;
  const { wasm } = env.backends.onnx;
  const runtime = `${lib}ort-wasm-simd-threaded.asyncify`;
  wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  // Threads need a server that sends COOP and COEP headers; without them there is one.
  if (!self.crossOriginIsolated) wasm.numThreads = 1;
  const here = !site.hub;
  Object.assign(env, {
    useWasmCache: false,
    allowLocalModels: here,
    allowRemoteModels: !here,
    localModelPath: './',
    // The library's own cache never looks for a newer file; of this site's files the browser's does.
    useBrowserCache: !here && 'caches' in self,
  });
  const model = here ? 'model' : site.hub;
  // CLIP's classes read text_model.onnx and vision_model.onnx, as the export calls them, and our preprocessing.
  const options = { device: 'wasm', dtype: site.dtype, progress_callback: tellProgress };
  tokenizer = await AutoTokenizer.from_pretrained(model);
  tokenizer.config.model_max_length = Infinity; // the graph cuts long texts, at the right end
  processor = await CLIPImageProcessor.from_pretrained(model);
  textModel = await CLIPTextModelWithProjection.from_pretrained(model, options);
  visionModel = await CLIPVisionModelWithProjection.from_pretrained(model, options);
  return site;
}

function tellProgress({ status, file, progress }) {
  if (status === 'progress') postMessage({ loading: `${file}, ${Math.round(progress)} %` });
}

async function embedTexts(texts) {
  const { text_embeds } = await textModel(tokenizer(texts, { padding: true }));
  return text_embeds.tolist();
}

async function embedImage({ data, width, height }) {
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel += 1) {
    for (let colour = 0; colour < 3; colour += 1) rgb[pixel * 3 + colour] = data[pixel * 4 + colour];
  }
  const { width: newWidth, height: newHeight } = processor.config.size;
  const fitting = new RawImage(resize(rgb, width, height, newWidth, newHeight), newWidth, newHeight, 3);
  const { image_embeds } = await visionModel(await processor(fitting));
  return image_embeds.tolist();
}

const loaded = load();
loaded.then((site) => postMessage({ ready: true, site }), (error) => postMessage({ error: String(error) }));

self.onmessage = async ({ data: { id, texts, image } }) => {
  try {
    await loaded;
    postMessage({ id, embeds: texts ? await embedTexts(texts) : await embedImage(image) });
  } catch (error) {
    postMessage({ id, error: String(error) });
  }
};
