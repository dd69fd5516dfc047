// The expert that is chosen: its patches, classes, parts, neighbours, neurons.

const AROUND = 1.5; // patches shown on each side of a typical one
const CROP = 112; // pixels

function showLayers() {
  const items = layers.map((one, index) => ({
    value: index, label: `layer ${one.layer}`, content: [make("span", {}, String(one.layer))],
  }));
  byId("layers").replaceChildren(...radios("layer", items));
}

function showExperts() {
  const { experts } = layerAt();
  const most = Math.max(...experts.map((one) => one.share)) || 1;
  const items = busiest().map((index) => ({
    value: index,
    label: `expert ${index}, ${percent(experts[index].share)} of the patches`,
    content: [
      make("span", {}, String(index)),
      make("i", { class: "use", "--share": String(experts[index].share / most) }),
    ],
  }));
  byId("experts").replaceChildren(...radios("expert", items));
}

function showExpert() {
  const { layer, hidden, grid } = layerAt();
  const expert = expertAt();
  byId("expert-title").textContent = `Layer ${layer}, expert ${chosen.expert}`;
  const leading = expert.leading ? ` It also gets ${expert.leading} leading tokens (CLS).` : "";
  byId("expert-told").textContent =
    `Takes ${percent(expert.share)} of the patches, in ${expert.images} of ${images.length} ` +
    `images, and keeps ${expert.neurons} of ${hidden} hidden neurons ` +
    `(${percent(expert.neurons / hidden)}).${leading}`;
  const none = make("li", {}, "No patch of these images goes to it.");
  refill("top", expert.top.length ? expert.top.map((patch) => crop(grid, patch)) : [none]);
  refill("tables", [
    shares("Classes that use it more than others do", ["class", "its tokens", "all"], expert.classes),
    shares("Parts its patches show more than others do", ["part", "its patches", "all"], expert.parts),
    others("Neighbours by mean input", ["expert", "cosine", "raw"], expert.near),
    others("Overlap of neurons", ["expert", "shared", "chance"], expert.overlap),
  ]);
}

// A button with a patch, framed, and what is around it.
function crop(grid, [image, row, column, cosine]) {
  const canvas = make("canvas", { width: CROP, height: CROP });
  const name = images[image].class;
  const label =
    `${name}, row ${row}, column ${column}, cosine ${decimal(cosine)}; show the image`;
  pictureOf(image).then((picture) => drawCrop(canvas, picture, grid, row, column));
  const place = { image, down: (row + 0.5) / grid[0], right: (column + 0.5) / grid[1] };
  const button = make(
    "button", { type: "button", "aria-label": label, onclick: () => choose(place) },
    canvas, make("span", {}, name),
  );
  return make("li", {}, button);
}

function drawCrop(canvas, picture, [rows, columns], row, column) {
  const [tall, wide] = [picture.naturalHeight / rows, picture.naturalWidth / columns];
  const side = Math.min(
    (1 + 2 * AROUND) * Math.max(tall, wide), picture.naturalWidth, picture.naturalHeight,
  );
  const within = (middle, size) => Math.min(Math.max(middle - side / 2, 0), size - side);
  const left = within((column + 0.5) * wide, picture.naturalWidth);
  const top = within((row + 0.5) * tall, picture.naturalHeight);
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = picture.naturalWidth >= CROP;
  brush.drawImage(picture, left, top, side, side, 0, 0, CROP, CROP);
  const scale = CROP / side;
  const frame = [
    (column * wide - left) * scale, (row * tall - top) * scale, wide * scale, tall * scale,
  ];
  for (const [colour, width] of [["#ffffff", 5], ["#d55e00", 2.5]]) {
    brush.strokeStyle = colour;
    brush.lineWidth = width;
    brush.strokeRect(...frame);
  }
}

// A table of names with their share, as a bar, beside the usual share, as a mark.
function shares(title, heads, rows) {
  const most = Math.max(...rows.flatMap(([, share, usual]) => [share, usual])) || 1;
  const body = rows.map(([name, share, usual]) => {
    const bar = make("i", {
      class: "bar", "--share": String(share / most), "--usual": String(usual / most),
    });
    return make(
      "tr", {}, make("th", { scope: "row" }, name),
      make("td", {}, percent(share), bar), make("td", {}, percent(usual)),
    );
  });
  return table(title, heads, body);
}

// A table of other experts of the layer, which can be chosen.
function others(title, heads, rows) {
  const body = rows.map(([expert, value, beside]) => {
    const label = `expert ${expert}`;
    const go = make("button", { type: "button", onclick: () => choose({ expert }) }, label);
    return make(
      "tr", {}, make("th", { scope: "row" }, go),
      make("td", {}, decimal(value)), make("td", {}, decimal(beside)),
    );
  });
  return table(title, heads, body);
}

function table(title, heads, body) {
  if (!body.length) return "";
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  return make(
    "table", {}, make("caption", {}, title), make("thead", {}, head), make("tbody", {}, ...body),
  );
}

listeners.push((changed) => {
  if (changed("layer")) showExperts();
  check("layers", chosen.layer);
  check("experts", chosen.expert);
  if (changed("layer") || changed("expert")) showExpert();
});
