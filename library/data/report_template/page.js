"use strict";
// Every text is set with textContent: names and captions are data, whatever they hold.
const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images;
const byId = (id) => document.getElementById(id);
const AT_ONCE = 60;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const size = (pair) => `${pair[0]} × ${pair[1]}`;
const percent = (share) => `${Math.round(100 * share)} %`;
const nameOf = (image) => image.path.split(/[\\/]/).pop();

// The picture as the model sees it: "frame" shows the whole resized image with the window that is cut out of it,
// "trained" the window alone. Both are mirrored when the sample is. "whole" is the file as it is.
function picture(image, edge, view) {
  const box = make("button", "picture");
  box.type = "button";
  box.title = image.path;
  if (!image.thumbnail) {
    const text = image.error || "no thumbnail";
    box.append(make("span", image.error ? "no-picture broken" : "no-picture", text));
    return box;
  }
  const [w, h] = image.resized;
  const [left, top, cropW, cropH] = image.crop;
  const shown = view === "trained" ? [left, top, cropW, cropH] : [0, 0, w, h];
  const scale = edge / Math.max(shown[2], shown[3]);
  const stage = make("div", image.flipped && view !== "whole" ? "stage flipped" : "stage");
  stage.style.width = `${shown[2] * scale}px`;
  stage.style.height = `${shown[3] * scale}px`;
  const layer = (className, source, alt) => {
    const element = make("img", className);
    element.src = source;
    element.alt = alt;
    element.decoding = "async";
    element.style.cssText = `left:${-shown[0] * scale}px;top:${-shown[1] * scale}px;width:${w * scale}px;height:${h * scale}px`;
    stage.append(element);
  };
  layer("", `data:image/jpeg;base64,${image.thumbnail}`, nameOf(image));
  if (image.mask && view !== "whole") layer("mask", `data:image/png;base64,${image.mask}`, "mask");
  if (view === "frame") {
    const frame = make("div", cropW === w && cropH === h ? "frame whole" : "frame");
    frame.style.cssText = `left:${left * scale}px;top:${top * scale}px;width:${cropW * scale}px;height:${cropH * scale}px`;
    stage.append(frame);
  }
  box.append(stage);
  return box;
}

const BADGES = {
  unreadable: ["unreadable", "bad"], unreadable_mask: ["unreadable mask", "bad"], no_caption: ["no caption", "warn"],
  empty_caption: ["empty caption", "warn"], cut_caption: ["caption is cut", "warn"],
  over_limit: ["over a limit", "warn"], duplicate: ["same file", "warn"], near_duplicate: ["look-alike", "warn"],
};

function badges(image) {
  const row = make("div", "badges");
  const add = (text, kind) => row.append(make("span", kind ? `badge ${kind}` : "badge", text));
  const problems = image.problems || [];
  if (image.upscale > 1) add(`${image.upscale.toFixed(2)} × enlarged`, problems.includes("too_small") ? "warn" : "");
  if (image.cropped >= 0.005) add(`${percent(image.cropped)} cropped`, image.cropped > data.heavyCrop ? "warn" : "");
  if (image.flipped) add("mirrored");
  if (image.mask) add("mask");
  if (!image.caption && (image.source || "").trim()) add("caption dropped");
  for (const kind of problems) if (BADGES[kind]) add(...BADGES[kind]);
  return row;
}

function captionLine(text) {
  return text ? make("div", "caption", text) : make("div", "caption quiet", "(empty)");
}

function card(image) {
  const element = make("article", "tilecard");
  const box = picture(image, 176, view());
  box.addEventListener("click", () => showDetail(image));
  const facts = make("div", "facts");
  const name = make("div", "name", nameOf(image));
  name.title = image.path;
  const numbers = [image.bucket.replace("x", " × "), `${image.tokens} tokens`];
  if (image.repeats > 1) numbers.push(`${image.repeats} repeats`);
  facts.append(name, make("div", "numbers", numbers.join(" · ")), badges(image), captionLine(image.caption));
  element.append(box, facts);
  return element;
}

function showDetail(image) {
  const body = byId("detail-body");
  const list = make("dl");
  const add = (term, text) => list.append(make("dt", "", term), make("dd", "", text));
  add("file", image.path);
  add("subset", image.subset);
  add("original", size(image.original));
  add("resized", `${size(image.resized)}, ${image.upscale > 1 ? "enlarged" : "scaled"} ${image.upscale.toFixed(2)} times`);
  add("cut out", `${size(image.crop.slice(2))} at left ${image.crop[0]}, top ${image.crop[1]}: ${percent(image.cropped)} is lost`);
  add("mirrored", image.flipped ? "yes" : "no");
  add("size ids", image.ids.join(", "));
  add("repeats", String(image.repeats));
  add("caption", image.caption || "(empty)");
  if (image.source !== undefined) add("as stored", image.source || "(empty)");
  add("tokens", image.tokens > data.limit ? `${image.tokens}, of which ${data.limit} are used` : String(image.tokens));
  for (const kind of image.problems || []) add("problem", data.kinds[kind]);
  const box = picture(image, 384, view());
  box.disabled = true;
  body.replaceChildren(box, list);
  byId("detail").showModal();
}

const view = () => byId("tools").elements.view.value;
const haystacks = new Map();
function haystack(image) {
  if (!haystacks.has(image)) haystacks.set(image, `${image.path}\n${image.caption}\n${image.source || ""}`.toLowerCase());
  return haystacks.get(image);
}

const ORDERS = {
  tokens: (a, b) => b.tokens - a.tokens,
  upscale: (a, b) => b.upscale - a.upscale,
  cropped: (a, b) => b.cropped - a.cropped,
  area: (a, b) => a.original[0] * a.original[1] - b.original[0] * b.original[1],
  path: (a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0),
};

let chosen = [];
let drawn = 0;

function choose() {
  const words = byId("search").value.toLowerCase().trim();
  const bucket = byId("bucket").value, problem = byId("problem").value, subset = byId("subset").value;
  chosen = images.filter((image) =>
    (!words || haystack(image).includes(words)) &&
    (!bucket || image.bucket === bucket) &&
    (!subset || image.subset === subset) &&
    (!problem || (problem === "any" ? image.problems : (image.problems || []).includes(problem))));
  const order = ORDERS[byId("sort").value];
  if (order) chosen.sort(order);
  byId("shown").textContent = chosen.length === images.length
    ? images.length.toLocaleString("en") : `${chosen.length.toLocaleString("en")} of ${images.length.toLocaleString("en")}`;
  byId("grid").replaceChildren();
  drawn = 0;
  drawMore();
}

function drawMore() {
  const next = chosen.slice(drawn, drawn + AT_ONCE);
  drawn += next.length;
  byId("grid").append(...next.map(card));
}

function fillSelect(id, entries) {
  for (const [value, text] of entries) {
    const option = make("option", "", text);
    option.value = value;
    byId(id).append(option);
  }
}

function countBy(keysOf) {
  const counts = new Map();
  for (const image of images) for (const key of keysOf(image)) counts.set(key, (counts.get(key) || 0) + 1);
  return counts;
}

function start() {
  const byWidth = (a, b) => parseInt(a, 10) - parseInt(b, 10) || a.localeCompare(b);
  const buckets = countBy((image) => [image.bucket]);
  fillSelect("bucket", [...buckets.keys()].sort(byWidth).map((key) => [key, `${key.replace("x", " × ")} (${buckets.get(key)})`]));
  const problems = countBy((image) => image.problems || []);
  if (problems.size) fillSelect("problem", [["any", "with any problem"]]);
  fillSelect("problem", Object.keys(data.kinds).filter((kind) => problems.has(kind)).map((kind) => [kind, `${data.kinds[kind]} (${problems.get(kind)})`]));
  const subsets = countBy((image) => [image.subset]);
  fillSelect("subset", [...subsets].map(([key, count]) => [key, `${key} (${count})`]));
  byId("subset").hidden = subsets.size < 2;
  byId("masks").hidden = !images.some((image) => image.mask);

  const without = images.filter((image) => !image.thumbnail && !image.error).length;
  if (without) {
    byId("note").hidden = false;
    byId("note").textContent = `${without.toLocaleString("en")} images have no thumbnail here, to keep the page small; images with problems come first. --max_thumbnails raises the number.`;
  }
  for (const figure of document.querySelectorAll("figure[data-image]")) {
    const image = images[Number(figure.dataset.image)];
    const box = picture(image, 172, "whole");
    box.addEventListener("click", () => showDetail(image));
    figure.prepend(box);
  }
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("tools").addEventListener("input", (event) => {
    if (event.target.id === "mask") document.body.classList.toggle("with-masks", event.target.checked);
    else choose();
  });
  byId("buckets").addEventListener("click", (event) => {
    const row = event.target.closest("button") && event.target.closest("tr");
    if (row) pick("bucket", row.dataset.bucket);
  });
  byId("tags").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) pick("search", button.textContent);
  });
  byId("detail").addEventListener("click", (event) => {
    if (event.target === byId("detail") || event.target.closest(".close")) byId("detail").close();
  });
  choose();
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) drawMore();
  }, { rootMargin: "1200px" }).observe(byId("end"));
}

function pick(id, value) {
  byId(id).value = value;
  choose();
  byId("images").scrollIntoView();
}

start();
