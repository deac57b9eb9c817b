// Jobs and their pictures, newest first, as the server tells of them.
import { $, ask, button, cut, make, number, plural, say } from "./base.js";

export const jobs = new Map();  // by id: { told, node, cards: Map(index -> card), steps: Map(index -> share) }
let desk = "", show = "all", act = () => {};
const LIVE = ["queued", "drawing"];

export const deskName = () => desk;
export const address = (job, name) => `/app/pictures/${desk}/${job}/${name}.png`;
export const live = (told) => LIVE.includes(told.state);

export function setUpJobs(action) {
  act = action;
  for (const name of ["all", "kept", "rejected"]) {
    const tab = button(name[0].toUpperCase() + name.slice(1), "", () => { show = name; list(); });
    tab.value = name;
    tab.append(make("small", ""));
    $("tabs").append(tab);
  }
  $("jobs").addEventListener("keydown", (event) => {
    const card = event.target.closest(".card");
    if (card && !event.ctrlKey && !event.metaKey && !event.altKey) key(card, event);
  });
  list();
}

const KEYS = { k: "keep", x: "reject", m: "more", v: "vary", p: "paint", s: "settings" };

function key(card, event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by) {
    const all = [...$("jobs").querySelectorAll(".card:not([hidden]) .open:not(:disabled)")];
    const next = all[all.indexOf(card.querySelector(".open")) + by];
    if (next) { event.preventDefault(); next.focus(); }
  } else if (KEYS[event.key.toLowerCase()] && card.dataset.drawn) {
    event.preventDefault();
    act(KEYS[event.key.toLowerCase()], card.dataset.job, Number(card.dataset.index));
  }
}

export const actionOf = (event) => KEYS[event.key.toLowerCase()];

export function hello(event) {
  const anew = desk && desk !== event.desk;
  desk = event.desk;
  sessionStorage.setItem("desk", desk);
  const known = new Set(event.jobs.map((told) => told.id));
  for (const id of [...jobs.keys()]) if (anew || !known.has(id)) drop(id);
  event.jobs.forEach(update);
  list();
  return anew;
}

export function update(told) {
  const job = jobs.get(told.id) || build(told);
  const before = job.told.state;
  job.told = told;
  for (let index = 0; index < told.count; index++) if (!job.cards.has(index)) addCard(job, index);
  for (const picture of told.pictures) showPicture(job, picture);
  if (!live(told)) for (const [index, card] of job.cards) if (!card.dataset.drawn && !card.dataset.failed) { card.remove(); job.cards.delete(index); }
  showState(job);
  if (before !== told.state && !live(told)) say(told.state === "done" ? `${plural(told.pictures.length, "picture")} drawn` : told.state === "failed" ? `Failed: ${told.reason}` : "Cancelled");
  list();
}

function build(told) {
  const prompt = make("p", "prompt", cut(told.fields.prompt || "picture"));
  prompt.dir = "auto";
  const rail = make("div", "rail", make("i"));
  rail.setAttribute("role", "progressbar");
  rail.setAttribute("aria-label", "Drawn");
  rail.setAttribute("aria-valuemin", "0"); rail.setAttribute("aria-valuemax", "100");
  const end = button("Cancel", "", () => {
    const job = jobs.get(told.id);
    if (!live(job.told) && !end.dataset.sure && job.told.pictures.some((one) => one.kept)) {
      end.dataset.sure = "1";
      end.textContent = "Remove kept ones too?";
      return;
    }
    ask(live(job.told) ? "/app/cancel" : "/app/forget", { desk, job: told.id }).catch((error) => say(error.message));
  });
  const state = make("span", "state"), about = make("div", "about", state, make("span", "settings"));
  const node = make("article", "job", make("div", "head", prompt, make("div", "ends", end), about), rail, make("div", "grid"));
  node.setAttribute("aria-label", cut(told.fields.prompt || "picture", 80));
  $("jobs").prepend(node);
  const job = { told, node, cards: new Map(), steps: new Map() };
  jobs.set(told.id, job);
  return job;
}

function addCard(job, index) {
  const open = button("", "open", () => act("open", job.told.id, index), `Picture ${index + 1}, not drawn yet`);
  open.disabled = true;
  open.append(make("span", "", "…"));
  const card = make("div", "card", open);
  card.dataset.job = job.told.id; card.dataset.index = index;
  job.cards.set(index, card);
  job.node.querySelector(".grid").append(card);
}

export function preview(event) {
  const card = jobs.get(event.job)?.cards.get(event.index);
  if (!card || card.dataset.drawn) return;
  card.classList.add("growing");
  imageOf(card).src = event.image;
}

function imageOf(card) {
  const open = card.querySelector(".open"), there = open.querySelector("img");
  if (there) return there;
  const image = make("img");
  image.alt = "";
  open.replaceChildren(image);
  return image;
}

export function step(event) {
  const job = jobs.get(event.job);
  if (!job) return;
  job.steps.set(event.index, event.step / event.steps);
  showState(job);
}

export function picture(event) {
  const job = jobs.get(event.job);
  if (!job) return;
  const others = job.told.pictures.filter((one) => one.index !== event.picture.index);
  job.told.pictures = [...others, event.picture].sort((a, b) => a.index - b.index);
  if (!job.cards.has(event.picture.index)) addCard(job, event.picture.index);
  showPicture(job, event.picture);
  for (const one of others) showPicture(job, one);  // which one is best may have changed
  showState(job);
  list();
}

export function forgotten(event) { drop(event.job); list(); }

function drop(id) { jobs.get(id)?.node.remove(); jobs.delete(id); }

function showPicture(job, told) {
  const card = job.cards.get(told.index), open = card.querySelector(".open");
  if (!told.drawn) {
    card.dataset.failed = "1";
    open.replaceChildren(make("span", "wrong", cut(told.reason || "failed", 100)));
    return;
  }
  const state = told.kept === true ? "kept" : told.kept === false ? "rejected" : "";
  const best = ranked(job.told)[0] === told && job.told.pictures.length > 1;
  card.className = `card ${state}`;
  if (!card.dataset.drawn) {
    card.dataset.drawn = "1";
    job.steps.set(told.index, 1);
    open.disabled = false;
    imageOf(card).src = address(job.told.id, told.index);
    const judge = (kept) => act(kept ? "keep" : "reject", job.told.id, told.index);
    card.append(make("div", "under", make("span"), button("✓", "yes", () => judge(true), "Keep"), button("✕", "no", () => judge(false), "Reject")));
  }
  const scores = Object.entries(told.scores || {});
  const clip = told.scores?.clip;
  card.querySelector(".under span").textContent = clip === undefined ? `seed ${told.seed}` : `clip ${number(clip)}`;
  card.querySelector(".under span").title = [`seed ${told.seed}`, ...scores.map(([name, value]) => `${name} ${number(value)}`)].join(", ");
  card.querySelector(".yes").setAttribute("aria-pressed", String(told.kept === true));
  card.querySelector(".no").setAttribute("aria-pressed", String(told.kept === false));
  open.querySelector(".badge")?.remove();
  if (state || best) open.append(make("span", "badge", state || "best"));
  open.setAttribute("aria-label", [`Picture ${told.index + 1}`, cut(job.told.fields.prompt || "", 80), state, best ? "best score" : "", clip === undefined ? "" : `clip ${number(clip)}`].filter(Boolean).join(", "));
  open.removeAttribute("title");
}

export const ranked = (told) => told.pictures.filter((one) => one.scores?.clip !== undefined).sort((a, b) => b.scores.clip - a.scores.clip);

function showState(job) {
  const { told, node } = job, s = told.settings;
  const drawn = told.pictures.filter((one) => one.drawn).length;
  const share = [...job.steps.values()].reduce((a, b) => a + b, 0) / told.count;
  const words = { queued: "waiting", drawing: `drawing ${Math.min(drawn + 1, told.count)} of ${told.count}`, done: plural(drawn, "picture"), cancelled: `cancelled after ${drawn} of ${told.count}`, failed: `failed: ${cut(told.reason || "", 200)}` };
  node.querySelector(".state").textContent = words[told.state];
  node.querySelector(".state").classList.toggle("wrong", told.state === "failed");
  node.querySelector(".settings").textContent = ["", `${s.num_inference_steps} steps`, s.guidance_scale === undefined ? "" : `guidance ${s.guidance_scale}`, `${s.width}×${s.height}`, `seed ${told.fields.seed}`, typeof s.scheduler === "string" ? s.scheduler : "", told.inputs.includes("image") ? `from a picture${told.inputs.includes("mask_image") ? " with a mask" : ""}, strength ${s.strength}` : "", told.inputs.includes("control_image") ? "follows a picture" : ""].filter((part, at) => !at || part).join(" · ");
  const rail = node.querySelector(".rail");
  rail.hidden = !live(told);
  rail.firstChild.style.width = `${100 * share}%`;
  rail.setAttribute("aria-valuenow", String(Math.round(100 * share)));
  const end = node.querySelector(".ends button");
  delete end.dataset.sure;
  end.textContent = live(told) ? "Cancel" : "Remove";
  end.setAttribute("aria-label", `${end.textContent} ${cut(told.fields.prompt || "picture", 60)}`);
}

// What is to be seen, and how many there are of each
function list() {
  const counts = { all: 0, kept: 0, rejected: 0 };
  let seen = 0;
  for (const job of jobs.values()) {
    let here = show === "all" ? 1 : 0;
    for (const told of job.told.pictures.filter((one) => one.drawn)) {
      const state = told.kept === true ? "kept" : told.kept === false ? "rejected" : "all";
      counts.all += 1;
      if (state !== "all") counts[state] += 1;
      const card = job.cards.get(told.index);
      if (card) card.hidden = show !== "all" && state !== show;
      if (card && !card.hidden) here += 1;
    }
    for (const card of job.cards.values()) if (!card.dataset.drawn) card.hidden = show !== "all";
    job.node.hidden = !here;
    seen += here;
  }
  for (const tab of $("tabs").children) {
    tab.setAttribute("aria-pressed", String(tab.value === show));
    tab.querySelector("small").textContent = String(counts[tab.value]);
  }
  $("none").hidden = seen > 0;
  if (show !== "all") $("none").textContent = `No ${show} pictures.`;
  else $("none").textContent = "Pictures appear here. A picture file that is dropped on this page gives its settings back.";
  $("keys").hidden = !counts.all;
  $("zip").hidden = !counts.kept;
  $("zip").href = `/app/kept/${desk}.zip`;
  const waiting = [...jobs.values()].filter((job) => live(job.told)).length;
  $("waiting").textContent = waiting ? `${plural(waiting, "job")} to draw` : "";
}

export function focusOn(id, index) { jobs.get(id)?.cards.get(index)?.querySelector(".open").focus(); }
