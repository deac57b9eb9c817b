// A mask, painted over a picture with a pointer or with keys. White is drawn anew.
import { $, say } from "./base.js";

let context = null, erasing = false, last = null, done = () => {};
const at = { x: 0, y: 0 };
const size = () => Math.max(2, $("brush").value / 100 * Math.min($("canvas").width, $("canvas").height));

// Shows the picture, a data: URL; `use` is called with the mask, a data: URL of a PNG.
export async function paint(image, use) {
  done = use;
  const under = $("under"), canvas = $("canvas");
  under.src = image;
  try { await under.decode(); } catch { say("The picture cannot be shown"); return; }
  canvas.width = under.naturalWidth; canvas.height = under.naturalHeight;
  context = canvas.getContext("2d", { willReadFrequently: true });
  at.x = canvas.width / 2; at.y = canvas.height / 2;
  $("tip").hidden = true;
  setErasing(false);
  $("paint").showModal();
  fit();
  canvas.focus();
}

function fit() {
  if (!$("paint").open) return;
  const under = $("under"), board = document.querySelector(".board");
  const room = innerHeight - 20 - [...$("paint").querySelectorAll(".panel")].reduce((sum, panel) => sum + panel.offsetHeight, 0) - 12;
  const scale = Math.max(0.05, Math.min((board.clientWidth - 12) / under.naturalWidth, room / under.naturalHeight));
  under.width = under.naturalWidth * scale; under.height = under.naturalHeight * scale;
  under.classList.toggle("small", scale > 2);
}

function setErasing(value) {
  erasing = value;
  $("erase").setAttribute("aria-pressed", String(value));
}

const ink = () => getComputedStyle(document.body).getPropertyValue("--accent");

function stroke(from, to) {
  context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
  context.strokeStyle = ink();
  context.lineWidth = size();
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x + 0.01, to.y);
  context.stroke();
}

function place(event) {
  const box = $("canvas").getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width * $("canvas").width, y: (event.clientY - box.top) / box.height * $("canvas").height };
}

function showTip() {
  const scale = $("canvas").clientWidth / $("canvas").width, tip = $("tip");
  tip.hidden = false;
  tip.style.left = `${at.x * scale}px`; tip.style.top = `${at.y * scale}px`;
  tip.style.width = tip.style.height = `${Math.max(6, size() * scale)}px`;
}

function painted() {
  const { data } = context.getImageData(0, 0, $("canvas").width, $("canvas").height);
  for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
  return false;
}

function invert() {
  context.globalCompositeOperation = "xor";
  context.fillStyle = ink();
  context.fillRect(0, 0, $("canvas").width, $("canvas").height);
}

function finish() {
  if (!painted()) { say("Nothing is painted"); $("paint-keys").textContent = "Nothing is painted yet: paint over what is to be drawn anew."; return; }
  const source = context.getImageData(0, 0, $("canvas").width, $("canvas").height);
  for (let i = 0; i < source.data.length; i += 4) {
    const value = source.data[i + 3] > 127 ? 255 : 0;
    source.data.set([value, value, value, 255], i);
  }
  const out = document.createElement("canvas");
  out.width = source.width; out.height = source.height;
  out.getContext("2d").putImageData(source, 0, 0);
  $("paint").close();
  done(out.toDataURL("image/png"));
}

function keys(event) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (by) {
    const before = { ...at }, far = size() / 2;
    at.x = Math.min($("canvas").width, Math.max(0, at.x + by[0] * far));
    at.y = Math.min($("canvas").height, Math.max(0, at.y + by[1] * far));
    if (event.shiftKey) stroke(before, at);
  } else if (event.key === " ") stroke(at, at);
  else return;
  event.preventDefault();
  showTip();
}

export function setUpPaint() {
  const canvas = $("canvas");
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    canvas.focus();
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    Object.assign(at, place(event));
    showTip();
    if (!last) return;
    for (const one of event.getCoalescedEvents?.() || [event]) { const next = place(one); stroke(last, next); last = next; }
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; });
  canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  canvas.addEventListener("keydown", keys);
  $("paint").addEventListener("keydown", (event) => { if (event.key.toLowerCase() === "e" && !event.ctrlKey && !event.metaKey) setErasing(!erasing); });
  $("erase").addEventListener("click", () => setErasing(!erasing));
  $("invert").addEventListener("click", invert);
  $("clear").addEventListener("click", () => context.clearRect(0, 0, canvas.width, canvas.height));
  $("paint-on").addEventListener("click", finish);
  $("paint-off").addEventListener("click", () => $("paint").close());
  addEventListener("resize", fit);
}
