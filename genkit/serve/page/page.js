// The page: what is asked for, and the stream of events that shows it being drawn.
import { $, asDataUrl, ask, pictureAt, Refusal, say } from "./base.js";
import { complain, fill, note, read, setFollowed, setStart, setUp, startPicture, usual } from "./form.js";
import { address, deskName, forgotten, hello, jobs, picture, preview, setUpJobs, step, update } from "./jobs.js";
import { paint, setUpPaint } from "./paint.js";
import { runs } from "./runs.js";
import { close, open, refresh, setUpView } from "./view.js";

const LIMIT = 2 ** 32;  // of seeds

async function draw(fields) {
  complain(null);
  try {
    note((await ask("/app/draw", { desk: deskName(), fields })).notes);
    say("Waiting to be drawn");
  } catch (error) { complain(error); say(error.message); }
}

// The fields of a job, with the pictures that it was drawn from
async function whole(told) {
  const fields = { ...told.fields };
  for (const name of told.inputs) fields[name] = await pictureAt(address(told.id, name));
  return fields;
}

const alike = ({ seed, num_images, keep, ...fields }) => JSON.stringify(fields);

// The first seed that no picture with these settings has had, as far as this page knows
function nextSeed(told) {
  const seeds = [...jobs.values()].filter((job) => alike(job.told.fields) === alike(told.fields))
    .flatMap((job) => [job.told.fields.seed].flat().map((seed) => seed + job.told.count));
  return Math.max(...seeds) % LIMIT;
}

const acts = {
  open: (told, index) => open(told.id, index),
  keep: (told, index, one) => ask("/app/keep", { desk: deskName(), job: told.id, index, kept: one.kept === true ? null : true }),
  reject: (told, index, one) => ask("/app/keep", { desk: deskName(), job: told.id, index, kept: one.kept === false ? null : false }),
  more: async (told) => draw({ ...await whole(told), seed: nextSeed(told) }),
  vary: async (told, index) => {
    const { seed, image, mask_image, ...fields } = await whole(told);
    await draw({ ...fields, image: await pictureAt(address(told.id, index)), strength: Number($("strength").value) || 0.6 });
  },
  paint: async (told, index) => {
    const image = await pictureAt(address(told.id, index)), { control_image } = await whole(told);
    close();
    await paint(image, (mask) => {
      fill({ ...told.fields, seed: "", strength: undefined });
      setStart(image, mask);
      setFollowed(control_image || null);
      $("draw").focus();
    });
  },
  settings: async (told, index, one) => {
    const { image, mask_image, control_image, ...fields } = await whole(told);
    fill({ ...fields, seed: one.seed });
    setStart(image || null, mask_image);
    setFollowed(control_image || null);
    close();
    note([]);
    say("Settings of the picture are in the form");
    $("draw").focus();
  },
};

async function act(name, id, index) {
  const told = jobs.get(id)?.told, one = told?.pictures.find((found) => found.index === index);
  if (!one) return;
  try {
    await acts[name](told, index, one);
    if (name === "keep" || name === "reject") say(one.kept === (name === "keep") ? "Undecided" : name === "keep" ? "Kept" : "Rejected");
  } catch (error) { complain(error); say(error.message); }
}

async function settingsOf(file) {
  complain(null);
  try {
    const found = await ask("/app/settings", file, "application/octet-stream");
    fill({ num_images: $("num_images").value, ...found.fields, model: found.model });
    const other = found.model && found.model !== $("model").textContent ? [`It was drawn by ${found.model}; this server has ${$("model").textContent}.`] : [];
    note([`Settings of ${file.name || "the picture"}.`, ...other, ...found.notes]);
  } catch (error) { complain(error); }
}

const takenBy = (use) => async (file) => {
  complain(null);
  try { use(await asDataUrl(file)); } catch (error) { complain(error); }
};

const events = {
  hello: (event) => { if (hello(event)) note(["The server does not have this page's earlier pictures any more."]); },
  job: (event) => { update(event.job); refresh(); },
  picture: (event) => { picture(event); refresh(); },
  forgotten: (event) => { forgotten(event); refresh(); },
  server: (event) => { $("link").textContent = event.ready ? "" : event.why; },
  preview, runs, step,
};

function listen() {
  const stream = new EventSource(`/app/events?desk=${encodeURIComponent(sessionStorage.getItem("desk") || "")}`);
  stream.addEventListener("message", (message) => {
    const event = JSON.parse(message.data);
    events[event.type]?.(event);
    if (event.type === "hello") document.body.dataset.ready = "yes";
  });
  stream.addEventListener("error", () => {
    $("link").textContent = "No answer from the server; trying again";
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
}

// Dropped files: of a page's own pictures the browser hands out no file, only links
function setUpFiles() {
  const files = (event) => [...event.dataTransfer?.types || []].includes("Files");
  addEventListener("dragover", (event) => { if (files(event)) { event.preventDefault(); $("drop").hidden = false; } });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
  addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!files(event)) return;
    event.preventDefault();
    settingsOf(event.dataTransfer.files[0]);
  });
  for (const [choose, input, use] of [["choose-start", "start-file", takenBy(setStart)], ["choose-follow", "follow-file", takenBy(setFollowed)], ["choose-settings", "settings-file", settingsOf]]) {
    $(choose).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => { if ($(input).files[0]) use($(input).files[0]); $(input).value = ""; });
  }
}

async function begin() {
  setUpJobs(act);
  setUpView(act);
  setUpPaint();
  setUpFiles();
  $("form").addEventListener("submit", (event) => { event.preventDefault(); draw(read()); });
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) { event.preventDefault(); $("form").requestSubmit(); }
  });
  $("usual").addEventListener("click", usual);
  $("mask").addEventListener("click", () => paint(startPicture(), (mask) => { setStart(startPicture(), mask); $("draw").focus(); }));
  $("unmask").addEventListener("click", () => { setStart(startPicture()); $("draw").focus(); });
  $("unstart").addEventListener("click", () => { setStart(null); $("draw").focus(); });
  $("unfollow").addEventListener("click", () => { setFollowed(null); $("draw").focus(); });
  try { setUp(await ask("/app/about")); } catch (error) { complain(error instanceof Refusal ? error : new Refusal(String(error))); return; }
  listen();
}

begin();
