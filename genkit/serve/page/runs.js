// Runs that prompt files began at /v1/runs, newest first, as the server tells of them. Nothing of them is kept here.
import { $, ask, button, cut, make, plural, say } from "./base.js";

const nodes = new Map();  // by id
const LIVE = ["waiting", "drawing"];

export function runs(event) {
  $("runs").hidden = !event.count;
  $("runs-live").textContent = event.live ? `${event.live} to draw` : "";
  $("runs-more").hidden = event.count <= event.runs.length;
  $("runs-more").textContent = `and ${plural(event.count - event.runs.length, "earlier run")}: GET /v1/runs`;
  const there = new Set(event.runs.map((run) => run.id));
  for (const [id, node] of nodes) if (!there.has(id)) { node.remove(); nodes.delete(id); }
  event.runs.forEach((run, at) => {
    const node = nodes.get(run.id) || build(run);
    if ($("runs-list").children[at] !== node) $("runs-list").insertBefore(node, $("runs-list").children[at] || null);
    show(node, run);
  });
}

function build(run) {
  const gallery = make("a", "", "Gallery"), name = cut(run.name, 80);
  gallery.href = run.links.gallery;
  gallery.target = "_blank"; gallery.rel = "noopener";
  gallery.setAttribute("aria-label", `Gallery of ${name}, in a new tab`);
  const end = button("Cancel", "", () => ask(`/v1/runs/${run.id}/cancel`, {}).catch((error) => say(error.message)), `Cancel ${name}`);
  const rail = make("div", "rail", make("i"));
  rail.setAttribute("role", "progressbar");
  rail.setAttribute("aria-label", `Drawn of ${name}`);
  rail.setAttribute("aria-valuemin", "0"); rail.setAttribute("aria-valuemax", "100");
  const node = make("article", "run", make("div", "name", name), make("div", "about"), make("div", "ends", gallery, end), rail);
  node.setAttribute("aria-label", `Run ${name}`);
  nodes.set(run.id, node);
  return node;
}

function show(node, run) {
  const { done, failed, kept, least, most } = run.images, live = LIVE.includes(run.state);
  const of = live ? `${done} of ${least === most ? most : `${least} to ${most}`} pictures` : plural(done, "picture");
  const state = run.state === "waiting" && run.reason ? `waiting: ${run.reason}` : run.state;
  const parts = [state, of, failed ? `${failed} failed` : "", kept === null ? "" : `${kept} kept`, new Date(1000 * run.created).toLocaleString()];
  node.querySelector(".about").textContent = parts.filter(Boolean).join(" · ");
  const rail = node.querySelector(".rail"), share = Math.min(100, Math.round(100 * (done + failed) / Math.max(1, most)));
  rail.hidden = !live;
  rail.firstChild.style.width = `${share}%`;
  rail.setAttribute("aria-valuenow", String(share));
  node.querySelector("button").hidden = !live;
}
