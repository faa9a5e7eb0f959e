// The page: pictures, a comparison of one picture with several texts, a search of all pictures. encoder.js embeds.

const LARGEST = 40e6; // pixels
const byId = (id) => document.getElementById(id);
const worker = new Worker(new URL('encoder.js', import.meta.url), { type: 'module' });
const waiting = new Map();
const pictures = []; // { name, url, embed: a promise of the embedding }
let site, chosen;

// ---- The encoder --------------------------------------------------------------------------------

/** { texts } or { image } -> a promise of the embeddings. */
function embed(message, transfer = []) {
  const id = crypto.getRandomValues(new Uint32Array(1))[0];
  worker.postMessage({ id, ...message }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

worker.onmessage = ({ data: { id, loading, ready, embeds, error, ...rest } }) => {
  if (loading) {
    say(`Loading the model: ${loading}`);
  } else if (ready) {
    site = rest.site;
    say(`${site.name} is ready.`);
    document.querySelectorAll('form button').forEach((button) => { button.disabled = false; });
  } else if (id === undefined) {
    say(`The model cannot be loaded: ${error}`, true);
  } else {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(embeds);
  }
};
worker.onerror = (event) => say(`The model cannot be loaded: ${event.message ?? 'the worker does not start'}`, true);

const cosine = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0); // both have length 1

function say(text, failed = false) {
  byId('status').textContent = text;
  byId('status').classList.toggle('failed', failed);
}

// ---- Pictures -----------------------------------------------------------------------------------

/** Anything drawable as a picture of the page; transparent parts become white. */
async function addPicture(name, drawable) {
  const { width, height } = drawable;
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.drawImage(drawable, 0, 0);
  const image = context.getImageData(0, 0, width, height);
  const url = URL.createObjectURL(await new Promise((resolve) => canvas.toBlob(resolve)));
  const picture = { name, url, embed: embed({ image }, [image.data.buffer]).then(([first]) => first) };
  picture.embed.catch((error) => say(`${name}: ${error.message}`, true));
  pictures.push(picture);
  showPicture(picture);
  return picture;
}

function showPicture(picture) {
  const button = Object.assign(document.createElement('button'), { type: 'button' });
  button.append(thumbnail(picture));
  button.onclick = () => choose(picture);
  picture.button = button;
  const item = document.createElement('li');
  item.append(button);
  byId('pictures').append(item);
  if (!chosen) choose(picture);
}

const thumbnail = ({ url, name }) => Object.assign(new Image(), { src: url, alt: name });

function choose(picture) {
  chosen = picture;
  for (const { button } of pictures) button.setAttribute('aria-pressed', button === picture.button);
  byId('probabilities').replaceChildren();
}

async function addFiles(files) {
  for (const file of files) {
    try {
      // As PIL reads files: turned as the camera says, colours as they are stored.
      const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
      if (bitmap.width * bitmap.height > LARGEST) throw new Error(`more than ${LARGEST / 1e6} million pixels`);
      choose(await addPicture(file.name, bitmap));
      bitmap.close();
    } catch (error) {
      say(`${file.name} cannot be read as a picture: ${error.message}`, true);
    }
  }
}

byId('files').onchange = ({ target }) => {
  addFiles([...target.files]);
  target.value = '';
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add('dropping');
};
document.ondragleave = () => document.body.classList.remove('dropping');
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  addFiles([...event.dataTransfer.files]);
};

// ---- Drawn to begin with: shapes and colours of training/scene_world.py -------------------------

const POLYGONS = {
  square: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
  triangle: [[0, -1], [1.1, 0.9], [-1.1, 0.9]],
  star: Array.from({ length: 10 }, (_, i) => {
    const [turn, radius] = [(i * Math.PI) / 5, i % 2 ? 0.5 : 1.2];
    return [radius * Math.sin(turn), -radius * Math.cos(turn)];
  }),
};
const SAMPLES = [
  ['a red circle', 'rgb(215 25 30)'],
  ['a blue square', 'rgb(25 65 205)'],
  ['a green triangle', 'rgb(20 145 55)'],
  ['a yellow star', 'rgb(245 205 0)'],
  ['a purple circle', 'rgb(130 35 170)'],
  ['an orange square', 'rgb(250 130 10)'],
];

function drawSample(name, colour) {
  const side = 256;
  const canvas = Object.assign(document.createElement('canvas'), { width: side, height: side });
  const context = canvas.getContext('2d');
  context.fillStyle = 'rgb(200 200 200)';
  context.fillRect(0, 0, side, side);
  context.translate(side / 2, side / 2);
  context.scale(side / 5, side / 5);
  const polygon = POLYGONS[name.split(' ').at(-1)];
  context.beginPath();
  if (polygon) polygon.forEach(([x, y]) => context.lineTo(x, y));
  else context.arc(0, 0, 1, 0, 2 * Math.PI);
  context.fillStyle = colour;
  context.fill();
  return canvas;
}

for (const [name, colour] of SAMPLES) await addPicture(name, drawSample(name, colour));

// ---- Comparing and searching --------------------------------------------------------------------

/** A form whose button rests while its answer is worked out. */
function answers(form, work) {
  byId(form).onsubmit = async (event) => {
    event.preventDefault();
    const button = event.target.querySelector('button');
    button.disabled = true;
    try {
      await work();
      say(`${site.name} is ready.`);
    } catch (error) {
      say(error.message, true);
    }
    button.disabled = false;
  };
}

answers('classify', async () => {
  const texts = [...new Set(byId('labels').value.split('\n').map((text) => text.trim()).filter(Boolean))];
  if (texts.length === 0) throw new Error('Type at least one text, one a line.');
  const [image, embeds] = await Promise.all([chosen.embed, embed({ texts })]);
  const logits = embeds.map((text) => site.logit_scale * cosine(image, text));
  const highest = Math.max(...logits);
  const parts = logits.map((logit) => Math.exp(logit - highest));
  const sum = parts.reduce((total, part) => total + part, 0);
  const rows = texts.map((text, index) => ({ text, share: parts[index] / sum })).sort((a, b) => b.share - a.share);
  byId('probabilities').replaceChildren(...rows.map(({ text, share }) => {
    const item = document.createElement('li');
    const meter = Object.assign(document.createElement('meter'), { value: share, ariaLabel: text });
    item.append(line(text), line(`${(100 * share).toFixed(1)} %`), meter);
    return item;
  }));
});

answers('search', async () => {
  const query = byId('query').value.trim();
  if (!query) throw new Error('Type a description of the picture first.');
  const [[text], ...images] = await Promise.all([embed({ texts: [query] }), ...pictures.map((each) => each.embed)]);
  const rows = pictures.map((picture, index) => ({ picture, score: cosine(text, images[index]) }));
  byId('found').replaceChildren(...rows.sort((a, b) => b.score - a.score).map(({ picture, score }) => {
    const item = document.createElement('li');
    const figure = document.createElement('figure');
    figure.append(thumbnail(picture), line(score.toFixed(3)));
    item.append(figure);
    return item;
  }));
});

const line = (text) => Object.assign(document.createElement('span'), { textContent: text });
