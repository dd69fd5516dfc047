// The image that is chosen: its patches, and the expert of one of them in every layer.

const SMALL = 84; // pixels of a layer's picture
const VEIL = 0.78; // how far patches of other experts fade

function showStrip() {
  const wanted = byId("class").value;
  const items = images
    .map((image, index) => ({ image, index }))
    .filter(({ image }) => !wanted || image.class === wanted)
    .map(({ image, index }) => ({
      value: index,
      label: `image ${index + 1}: ${image.class}`,
      content: [make("img", { src: source(index), alt: "", loading: "lazy", decoding: "async" })],
    }));
  byId("strip").replaceChildren(...radios("image", items));
}

function showClasses() {
  const names = [...new Set(images.map((image) => image.class))].sort();
  byId("class").replaceChildren(
    make("option", { value: "" }, `all ${names.length} classes`),
    ...names.map((name) => make("option", { value: name }, name)),
  );
}

function showImage() {
  const image = images[chosen.image];
  if (byId("class").value && byId("class").value !== image.class) {
    byId("class").value = "";
    showStrip();
  }
  byId("image-title").textContent = `Image ${chosen.image + 1}: ${image.class}`;
  const picture = byId("picture");
  picture.onload = () => picture.classList.toggle("smooth", picture.naturalWidth >= 128);
  picture.src = source(chosen.image);
  picture.alt = `image ${chosen.image + 1}: ${image.class}`;
  const dense = image.dense === undefined ? "" : `, the dense model “${image.dense}”`;
  byId("said").textContent = `The mixture says “${image.moe}”${dense}.`;
  check("strip", chosen.image);
  const thumbnail = byId("strip").querySelector("label:has(:checked)");
  if (thumbnail) keepInView(byId("strip"), thumbnail);
}

// Scroll the strip alone, never the page.
function keepInView(strip, thumbnail) {
  const [left, right] = [thumbnail.offsetLeft, thumbnail.offsetLeft + thumbnail.offsetWidth];
  if (left < strip.scrollLeft) strip.scrollLeft = left;
  else if (right > strip.scrollLeft + strip.clientWidth) strip.scrollLeft = right - strip.clientWidth;
}

// One cell for each patch of the layer: arrows move, Enter takes its expert.
function showPatches() {
  const [rows, columns] = layerAt().grid;
  const grid = byId("patches");
  grid.style.setProperty("--rows", rows);
  grid.style.setProperty("--columns", columns);
  grid.setAttribute("aria-label", `patches of the image, ${rows} rows of ${columns}`);
  grid.replaceChildren(
    ...Array.from({ length: rows }, (_, row) =>
      make("div", { role: "row" }, ...Array.from({ length: columns }, (_, column) =>
        make("div", { role: "gridcell", "data-row": row, "data-column": column })))),
  );
  markPatches();
}

function placeOf(cell) {
  const [rows, columns] = layerAt().grid;
  return {
    down: (Number(cell.dataset.row) + 0.5) / rows,
    right: (Number(cell.dataset.column) + 0.5) / columns,
  };
}

function isAt(cell) {
  const [rows, columns] = layerAt().grid;
  return Math.floor(chosen.down * rows) === Number(cell.dataset.row) &&
    Math.floor(chosen.right * columns) === Number(cell.dataset.column);
}

// Fade the patches that go elsewhere than the chosen one.
function markPatches() {
  const layer = layerAt();
  const own = routed(layer, chosen.image, chosen.down, chosen.right);
  for (const cell of byId("patches").querySelectorAll("[role=gridcell]")) {
    const { down, right } = placeOf(cell);
    const expert = routed(layer, chosen.image, down, right);
    const here = isAt(cell);
    cell.className = expert === own ? "same" : "";
    cell.classList.toggle("here", here);
    for (const edge of edges(cell)) cell.classList.add(edge);
    cell.tabIndex = here ? 0 : -1;
    cell.setAttribute("aria-selected", String(here));
    cell.setAttribute(
      "aria-label",
      `row ${cell.dataset.row}, column ${cell.dataset.column}: expert ${expert}`,
    );
  }
}

// Sides, of the right and the lower one, where another token begins.
function edges(cell) {
  const tokens = tokensOf(layerAt(), chosen.image);
  if (!tokens) return [];
  const [rows, columns] = layerAt().grid;
  const [row, column] = [Number(cell.dataset.row), Number(cell.dataset.column)];
  const number = row * columns + column;
  const differs = (there, other) => there && tokens[number] !== tokens[other];
  return [
    ...(differs(column + 1 < columns, number + 1) ? ["edge-right"] : []),
    ...(differs(row + 1 < rows, number + columns) ? ["edge-below"] : []),
  ];
}

// How many patches are one token with the chosen one, in words.
function tellToken() {
  const { image, down, right } = chosen;
  const tokens = tokensOf(layerAt(), image);
  if (!tokens) return "";
  const own = tokens[placeIn(layerAt(), 0, down, right)];
  const others = tokens.filter((token) => token === own).length - 1;
  if (!others) return " It is a token of its own.";
  return ` It is one token with ${others} other${others === 1 ? "" : "s"}.`;
}

function showAcross() {
  const { image, down, right } = chosen;
  const [rows, columns] = layerAt().grid;
  const own = routed(layerAt(), image, down, right);
  byId("patch-told").textContent =
    `Row ${Math.floor(down * rows)}, column ${Math.floor(right * columns)}: expert ${own} in ` +
    `layer ${layerAt().layer} (${percent(layerAt().experts[own].share)} of all patches).` +
    tellToken();
  refill("across", layers.map((layer, index) => {
    const expert = routed(layer, image, down, right);
    const canvas = make("canvas", { width: SMALL, height: SMALL });
    pictureOf(image).then((picture) => drawSame(canvas, picture, layer, expert));
    const name = `layer ${layer.layer}: expert ${expert}`;
    const button = make("button", {
      type: "button", "aria-pressed": String(index === chosen.layer && expert === chosen.expert),
      onclick: () => choose({ layer: index, expert }),
    }, canvas, make("span", {}, name));
    return make("li", {}, button);
  }));
}

function drawSame(canvas, picture, layer, expert) {
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = picture.naturalWidth >= 2 * SMALL;
  brush.drawImage(picture, 0, 0, SMALL, SMALL);
  const [rows, columns] = layer.grid;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  brush.fillStyle = dark ? `rgb(12 14 17 / ${VEIL})` : `rgb(255 255 255 / ${VEIL})`;
  const edge = (place, count) => Math.round((place * SMALL) / count);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const there = routed(layer, chosen.image, (row + 0.5) / rows, (column + 0.5) / columns);
      if (there === expert) continue;
      const [x, y] = [edge(column, columns), edge(row, rows)];
      brush.fillRect(x, y, edge(column + 1, columns) - x, edge(row + 1, rows) - y);
    }
  }
}

function step(by) {
  const shown = [...byId("strip").querySelectorAll("input")].map((button) => Number(button.value));
  const place = shown.indexOf(chosen.image);
  choose({ image: shown[(place + by + shown.length) % shown.length] });
}

const MOVES = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
};

function onKey(event) {
  const cell = event.target.closest("[role=gridcell]");
  if (!cell) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose({ expert: routed(layerAt(), chosen.image, chosen.down, chosen.right) });
  } else if (MOVES[event.key]) {
    event.preventDefault();
    const [down, right] = MOVES[event.key];
    const row = Number(cell.dataset.row) + down;
    const column = Number(cell.dataset.column) + right;
    const next = byId("patches").querySelector(`[data-row="${row}"][data-column="${column}"]`);
    if (!next) return;
    choose(placeOf(next));
    next.focus();
  }
}

function onPatch(act) {
  return (event) => {
    const cell = event.target.closest("[role=gridcell]");
    if (cell) act(cell);
  };
}

listeners.push((changed) => {
  if (changed("image")) showImage();
  if (changed("layer")) showPatches();
  if (["image", "layer", "down", "right"].some(changed)) markPatches();
  if (["image", "layer", "expert", "down", "right"].some(changed)) showAcross();
});

byId("class").addEventListener("change", () => {
  showStrip();
  const first = byId("strip").querySelector("input");
  choose({ image: Number(first.value) });
});
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("patches").addEventListener("keydown", onKey);
byId("patches").addEventListener("pointerover", onPatch((cell) => choose(placeOf(cell))));
byId("patches").addEventListener("click", onPatch((cell) => {
  choose(placeOf(cell));
  choose({ expert: routed(layerAt(), chosen.image, chosen.down, chosen.right) });
}));
addEventListener("hashchange", () => choose(fromAddress()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAcross);

Object.assign(chosen, fromAddress());
showLayers();
showClasses();
showStrip();
for (const listen of listeners) listen(() => true);
