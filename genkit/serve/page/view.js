// One picture, large, with its facts and what can be done with it.
import { $, button, make, number } from "./base.js";
import { actionOf, address, focusOn, jobs } from "./jobs.js";

let current = null, act = () => {};
const ACTIONS = [["keep", "Keep", "K"], ["reject", "Reject", "X"], ["more", "More like this", "M"], ["vary", "Vary", "V"], ["paint", "Paint", "P"], ["settings", "Use its settings", "S"]];

const told = () => jobs.get(current.job)?.told;
const shown = () => told()?.pictures.find((one) => one.index === current.index);

export function setUpView(action) {
  act = action;
  for (const [name, title, key] of ACTIONS) {
    const node = button(title, "", () => act(name, current.job, current.index));
    node.id = `view-${name}`;
    node.append(make("kbd", "", key));
    $("view-actions").append(node);
  }
  const save = make("a", "", "Save");
  save.id = "save";
  $("view-actions").append(save, button("Close", "", () => $("view").close()));
  $("view").addEventListener("click", (event) => { if (event.target === $("view")) $("view").close(); });
  $("view").addEventListener("close", () => { if (current) focusOn(current.job, current.index); });
  $("view").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], name = actionOf(event);
    if (by) move(by);
    else if (name) { event.preventDefault(); act(name, current.job, current.index); }
  });
  $("big").addEventListener("load", () => $("big").classList.toggle("small", $("big").naturalWidth <= 256));
}

function move(by) {
  const all = [...jobs.values()].reverse().flatMap((job) => job.told.pictures.filter((one) => one.drawn).map((one) => ({ job: job.told.id, index: one.index })));
  const next = all[all.findIndex((one) => one.job === current.job && one.index === current.index) + by];
  if (next) open(next.job, next.index);
}

export function open(job, index) {
  current = { job, index };
  refresh();
  if (!$("view").open) { $("view").showModal(); $("view-keep").focus(); }
}

export const close = () => { if ($("view").open) $("view").close(); };

// Shows what is known of the picture now.
export function refresh() {
  const picture = current && shown();
  if (!picture) { close(); return; }
  const { fields, settings } = told(), url = address(current.job, current.index);
  if (!$("big").src.endsWith(url)) $("big").src = url;
  $("big").alt = fields.prompt || `Picture ${current.index + 1}`;
  $("view-prompt").textContent = fields.prompt || `Picture ${current.index + 1}`;
  $("save").href = url; $("save").download = `${current.job}-${current.index}-${picture.seed}.png`;
  const { num_inference_steps, num_images, keep, ...others } = settings;
  const loras = (fields.loras || []).map((lora) => lora.name ? `${lora.name} ${lora.weight ?? 1}` : String(lora)).join(", ");
  const pairs = [["seed", picture.seed], ...Object.entries(picture.scores || {}), ["negative prompt", fields.negative_prompt], ["steps", num_inference_steps], ...Object.entries(others), ["LoRAs", loras], ["ControlNet", fields.control && `${fields.control} ${fields.control_weight ?? 1}`], ["seconds", picture.seconds]];
  $("view-facts").replaceChildren(...pairs.filter(([, value]) => value !== undefined && value !== null && value !== "").flatMap(([name, value]) =>
    [make("dt", "", name.replaceAll("_", " ")), make("dd", "", typeof value === "number" ? number(value) : typeof value === "string" ? value : JSON.stringify(value))]));
  $("view-keep").setAttribute("aria-pressed", String(picture.kept === true));
  $("view-reject").setAttribute("aria-pressed", String(picture.kept === false));
}
