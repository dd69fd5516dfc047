// What is chosen, where it is kept (in the address), and what everything else is made with.

const { layers, images } = JSON.parse(document.getElementById("facts").textContent);
const chosen = { layer: 0, expert: 0, image: 0, down: 0.5, right: 0.5 };
const listeners = [];

const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const decimal = (value) => value.toFixed(2).replace("-", "−");
const layerAt = () => layers[chosen.layer];
const expertAt = () => layerAt().experts[chosen.expert];

// An element; strings among the children become text, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Change what is chosen, tell everybody, and keep it in the address.
function choose(change) {
  const before = { ...chosen };
  Object.assign(chosen, change);
  if (chosen.layer !== before.layer && change.expert === undefined) chosen.expert = busiest()[0];
  const changed = (name) => chosen[name] !== before[name];
  for (const listen of listeners) listen(changed);
  const layer = layerAt().layer;
  const text = `#layer=${layer}&expert=${chosen.expert}&image=${chosen.image}` +
    `&patch=${chosen.down.toFixed(3)},${chosen.right.toFixed(3)}`;
  history.replaceState(null, "", text);
}

// Experts of a layer, most used first.
function busiest({ experts } = layerAt()) {
  return experts.map((_, index) => index).sort((a, b) => experts[b].share - experts[a].share);
}

// What the address says; else the busiest expert in the middle, and its most typical patch.
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : -1);
  const found = layers.findIndex((one) => one.layer === whole("layer"));
  const layer = found >= 0 ? found : Math.floor(layers.length / 2);
  const { experts, grid } = layers[layer];
  const expert = experts[whole("expert")] ? whole("expert") : busiest(layers[layer])[0];
  if (images[whole("image")]) {
    const [down, right] = (given.get("patch") ?? "").split(",").map(Number);
    const share = (value) => (value >= 0 && value < 1 ? value : 0.5);
    return { layer, expert, image: whole("image"), down: share(down), right: share(right) };
  }
  const [image, row, column] = experts[expert].top[0] ?? [0, 0, 0];
  return { layer, expert, image, down: (row + 0.5) / grid[0], right: (column + 0.5) / grid[1] };
}

// Place of a patch among those of all images; its own is given as shares of height and width.
function placeIn(layer, image, down, right) {
  const [rows, columns] = layer.grid;
  const row = Math.min(Math.floor(down * rows), rows - 1);
  const column = Math.min(Math.floor(right * columns), columns - 1);
  return (image * rows + row) * columns + column;
}

// Expert of the patch of an image at a place.
function routed(layer, image, down, right) {
  return unpack(layer, "routes")[placeIn(layer, image, down, right)];
}

// Tokens that the patches of an image have become, row by row; nothing where none merge.
function tokensOf(layer, image) {
  if (!layer.tokens) return undefined;
  const first = placeIn(layer, image, 0, 0);
  return unpack(layer, "tokens").subarray(first, first + layer.grid[0] * layer.grid[1]);
}

function unpack(layer, name) {
  layer.unpacked ??= {};
  layer.unpacked[name] ??= new Uint16Array(
    Uint8Array.from(atob(layer[name]), (letter) => letter.charCodeAt(0)).buffer,
  );
  return layer.unpacked[name];
}

const source = (image) => `data:image/webp;base64,${images[image].picture}`;
const decoded = new Map();

// The picture of an image, ready to be drawn.
function pictureOf(image) {
  if (!decoded.has(image)) {
    const picture = new Image();
    picture.src = source(image);
    decoded.set(image, picture.decode().then(() => picture));
  }
  return decoded.get(image);
}

// Put other children into a place; who was on a button there with the keyboard stays on it.
function refill(id, children) {
  const place = byId(id);
  const at = [...place.querySelectorAll("button")].indexOf(document.activeElement);
  place.replaceChildren(...children);
  if (at >= 0) place.querySelectorAll("button")[at]?.focus({ preventScroll: true });
}

function check(id, value) {
  for (const button of byId(id).querySelectorAll("input")) {
    button.checked = Number(button.value) === value;
  }
}

// Radio buttons: one stop for the Tab key, arrows within.
function radios(name, items) {
  return items.map(({ value, label, content }) => {
    const button = make("input", {
      type: "radio", name, value, "aria-label": label, onchange: () => choose({ [name]: value }),
    });
    return make("label", { title: label }, button, ...content);
  });
}
