// What all parts of the page use. Whatever people or pictures say is put in with textContent and properties: nothing here
// makes HTML out of text.
export const $ = (id) => document.getElementById(id);

export function make(tag, className, ...inside) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...inside);
  return node;
}

export function button(text, className, action, label) {
  const node = make("button", className, text);
  node.type = "button";
  if (label) { node.setAttribute("aria-label", label); node.title = label; }
  node.addEventListener("click", action);
  return node;
}

// Tells those who hear the page what happened
export function say(text) { $("said").textContent = text; }

export const cut = (text, most = 300) => text.length > most ? `${[...text.slice(0, most)].slice(0, -1).join("")}…` : text;
export const number = (value) => Number.isInteger(value) ? String(value) : value.toPrecision(3);
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export class Refusal extends Error {
  constructor(message, field) { super(message); this.field = field; }
}

export async function ask(path, body, type = "application/json") {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": type }, body: type === "application/json" ? JSON.stringify(body) : body };
  let answer;
  try { answer = await fetch(path, options); } catch { throw new Refusal("no answer: is genkit serve still running?"); }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(found.error?.message || found.error || `the server answered ${answer.status}`, found.field);
  return found;
}

export function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Refusal("the file cannot be read")));
    reader.readAsDataURL(blob);
  });
}

export async function pictureAt(url) {
  const answer = await fetch(url).catch(() => null);
  if (!answer || !answer.ok) throw new Refusal("the picture is not held by the server any more");
  return asDataUrl(await answer.blob());
}
