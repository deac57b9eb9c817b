// The form: a row's fields in and out of it.
import { $, button, cut, make, say } from "./base.js";

const NUMBERS = ["num_images", "num_inference_steps", "guidance_scale", "width", "height", "seed"];
const WORDS = ["prompt", "negative_prompt"];
const OWN = [...NUMBERS, ...WORDS, "scheduler", "loras", "strength", "keep", "image", "mask_image", "model", "control", "control_image", "control_weight", "control_preprocess"];
const USUAL_STRENGTH = "0.6";
let about = null;
let models = new Map();  // by name, what `about` is of each
let extra = {};  // fields that the form has no place for, as from a picture file
const start = { image: null, mask: null, touched: false };
let followed = null;  // the picture that a ControlNet reads, as a data: URL

export const startPicture = () => start.image;

// What the form shows of one of the server's models.
function take(found) {
  about = found;
  $("model").textContent = $("choice").value = found.model;
  document.title = `${found.model} · genkit`;
  $("words").hidden = !found.text;
  $("scored").hidden = !found.scores;
  for (const side of ["width", "height"]) $(side).step = found.multiple;
}

export function setUp(found) {
  models = new Map(found.models.map((one) => [one.model, one]));
  for (const name of models.keys()) $("choice").append(new Option(name, name));
  $("which").hidden = models.size < 2;
  $("choice").addEventListener("change", () => { take(models.get($("choice").value)); usual(); });
  take(found);
  for (const name of found.solvers) $("solver").append(new Option(name, name));
  for (const name of found.spacings) $("spacing").append(new Option(name, name));
  $("num_images").max = found.most.images;
  $("num_inference_steps").max = found.most.steps;
  $("loras").hidden = !found.loras.length;
  for (const name of found.loras) {
    const box = make("input"), weight = make("input");
    box.type = "checkbox"; box.dataset.lora = name;
    weight.type = "number"; weight.step = "0.1"; weight.value = "1"; weight.setAttribute("aria-label", `Weight of ${name}`);
    $("loras").append(make("label", "", box, name, weight));
  }
  $("choose-follow").hidden = !found.controls.length;
  for (const name of found.controls) $("control").append(new Option(name, name));
  const reading = { none: "the picture", canny: "its edges", invert: "its negative" };
  for (const name of found.preprocess) $("control_preprocess").append(new Option(reading[name] || name, name));
  for (const name of [...NUMBERS, ...WORDS, "strength", "control_weight"]) $(name).addEventListener("input", () => complain(null));
  $("strength").addEventListener("input", () => { start.touched = true; });
  fill({ num_images: Math.min(4, found.most.images) });
}

export function usual() {
  fill({ num_images: $("num_images").value, prompt: $("prompt").value, negative_prompt: $("negative_prompt").value });
  note([]);
}

// Fields that are not stated are the model's own.
export function fill(fields) {
  if (models.has(fields.model)) take(models.get(fields.model));
  const all = { ...about.defaults, ...fields };
  for (const name of [...NUMBERS, ...WORDS]) if (name !== "num_images" || all[name]) $(name).value = all[name] ?? "";
  if (Array.isArray(all.seed)) $("seed").value = all.seed[0];
  extra = Object.fromEntries(Object.entries(fields).filter(([name]) => !OWN.includes(name)));
  const [solver, spacing] = split(fields.scheduler);  // unstated it is the server's choice, which may depend on the steps
  $("solver").value = solver; $("spacing").value = spacing;
  if (fields.scheduler && !solver && !spacing) extra.scheduler = fields.scheduler;
  if (fields.strength) { $("strength").value = fields.strength; start.touched = true; }
  const given = new Map((fields.loras || []).map((lora) => typeof lora === "string" ? [lora, {}] : [lora.name, lora]));
  for (const box of $("loras").querySelectorAll("[data-lora]")) {
    const lora = given.get(box.dataset.lora);
    box.checked = Boolean(lora);
    box.parentNode.querySelector("[type=number]").value = lora?.weight ?? 1;
  }
  if (fields.control) $("control").value = fields.control;
  if (fields.control_preprocess) $("control_preprocess").value = fields.control_preprocess;
  if (fields.control_weight !== undefined) $("control_weight").value = fields.control_weight;
  showExtra();
  complain(null);
}

function split(scheduler) {
  if (typeof scheduler !== "string") return ["", ""];
  if (about.solvers.includes(scheduler)) return [scheduler, ""];
  const spacing = about.spacings.find((name) => scheduler.endsWith(`_${name}`)) || "";
  const solver = scheduler.slice(0, -spacing.length - 1);
  return spacing && about.solvers.includes(solver) ? [solver, spacing] : ["", ""];
}

function showExtra() {
  $("extra").replaceChildren(...Object.entries(extra).map(([name, value]) => {
    const text = make("span", "", `${name}: ${cut(typeof value === "string" ? value : JSON.stringify(value), 80)}`);
    return make("li", "", text, button("×", "", () => { delete extra[name]; showExtra(); $("draw").focus(); }, `Without ${name}`));
  }));
  $("extra").hidden = !Object.keys(extra).length;
}

// The row as the form states it. Throws nothing: the server says what is wrong.
export function read() {
  const fields = { ...extra };
  if (models.size > 1) fields.model = about.model;
  for (const name of NUMBERS) if ($(name).value !== "") fields[name] = Number($(name).value);
  if (about.text) for (const name of WORDS) if ($(name).value || name === "prompt") fields[name] = $(name).value;
  const solver = $("solver").value, spacing = $("spacing").value;
  if (solver) fields.scheduler = spacing ? `${solver}_${spacing}` : solver;
  else if (spacing) fields.scheduler = { spacing };
  if (about.scores && $("scores").checked && fields.num_images > 0) fields.keep = fields.num_images;
  const loras = [...$("loras").querySelectorAll("[data-lora]:checked")].map((box) => ({ name: box.dataset.lora, weight: Number(box.parentNode.querySelector("[type=number]").value) }));
  if (loras.length) fields.loras = loras;
  if (start.image) {
    fields.image = start.image;
    if (start.mask) fields.mask_image = start.mask;
    if ($("strength").value !== "") fields.strength = Number($("strength").value);
  }
  if (followed) {
    Object.assign(fields, { control: $("control").value, control_image: followed, control_preprocess: $("control_preprocess").value });
    if ($("control_weight").value !== "") fields.control_weight = Number($("control_weight").value);
  }
  return fields;
}

// The picture that a ControlNet follows, as a data: URL; null is none.
export function setFollowed(image) {
  followed = image;
  $("follow").hidden = !image;
  if (image) $("followed").src = image;
  say(image ? "Picture to follow set" : "No picture to follow");
}

// A picture as a data: URL; null is none.
export function setStart(image, mask = null) {
  start.image = image; start.mask = image && mask;
  $("start").hidden = !image;
  if (image) $("thumb").src = image;
  $("stencil").hidden = $("unmask").hidden = !start.mask;
  if (start.mask) $("stencil").src = mask;
  $("mask").textContent = start.mask ? "Paint anew" : "Paint a mask";
  // What is under a mask is drawn anew altogether, unless another strength was asked for.
  if (!start.touched || !$("strength").value) $("strength").value = start.mask ? "1" : USUAL_STRENGTH;
  if (!image) { start.touched = false; }
  say(!image ? "No start picture" : start.mask ? "Start picture with a mask" : "Start picture set");
}

export function complain(error) {
  for (const node of document.querySelectorAll("[aria-invalid]")) { node.removeAttribute("aria-invalid"); node.removeAttribute("aria-describedby"); }
  $("problem").hidden = !error;
  $("problem").textContent = error ? cut(error.message, 500) : "";
  const at = error?.field && { scheduler: "solver", image: "choose-start", controls: "control", control_image: "choose-follow" }[error.field] || error?.field;
  const node = at && $(at);
  if (node && $("form").contains(node)) { node.setAttribute("aria-invalid", "true"); node.setAttribute("aria-describedby", "problem"); node.focus(); }
}

export function note(lines) {
  $("notes").replaceChildren(...lines.slice(0, 30).map((line) => make("p", "", cut(line, 300))));
  $("notes").hidden = !lines.length;
}
