// Prompts and names are put in with textContent and properties: nothing here makes HTML out of text.
const $ = (id) => document.getElementById(id);
const sharpen = (img) => img.classList.toggle("small", img.naturalWidth <= 256);  // small pictures are shown enlarged
let busy = true;

async function ask(path, options) {
  busy = true;
  try {
    const answer = await fetch(path, options);
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    $("problem").textContent = "";
    $("rail").firstChild.style.width = `${100 * state.done / Math.max(1, state.done + state.left)}%`;
    $("undo").disabled = !state.undo;
    await show(state);
  } catch (error) {
    $("problem").textContent = error instanceof TypeError ? "no answer: is genkit label still running?" : error.message;
  }
  busy = false;
}

const send = (answer) => ask("vote", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(answer) });

function tell(prompt, name, counts) {
  $("prompt").textContent = prompt;
  $("prompt").scrollTop = 0;
  $("name").textContent = name;
  $("counts").textContent = counts;
}
