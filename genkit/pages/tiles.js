const loaded = new Map();  // <img> by number: those that are shown, and the next ones

function picture(number) {
  if (!loaded.has(number)) {
    const img = new Image();
    img.draggable = false;
    img.src = `image/${number}`;
    loaded.set(number, img);
  }
  return loaded.get(number);
}

async function ready(numbers) {  // whether all can be shown, as soon as that is known
  const whole = await Promise.all(numbers.map((number) => picture(number).decode().then(() => true, () => false)));
  return !whole.includes(false);
}

function keep(numbers) {  // load these, forget all others
  const wanted = new Set(numbers);
  for (const number of wanted) picture(number);
  for (const number of loaded.keys()) if (!wanted.has(number)) loaded.delete(number);
}

// As many columns as make the pictures largest, each only as wide as they are.
function arrange() {
  const nodes = [...$("grid").children], { clientWidth: width, clientHeight: height } = $("grid");
  if (!nodes.length) return;
  const sizes = nodes.map((node) => [node.firstChild.naturalWidth || 1, node.firstChild.naturalHeight || 1]);
  let best = { area: -1 };
  for (let columns = 1; columns <= nodes.length; columns++) {
    const rows = Math.ceil(nodes.length / columns), frame = 14, gap = 8;  // padding and border of a tile
    const wide = Math.floor((width + gap) / columns) - gap - frame, high = Math.floor((height + gap) / rows) - gap - frame;
    const scales = sizes.map(([w, h]) => Math.max(0, Math.min(wide / w, high / h)));
    const area = sizes.reduce((sum, [w, h], k) => sum + w * h * scales[k] ** 2, 0);
    const most = (side) => Math.ceil(Math.max(...sizes.map((size, k) => size[side] * scales[k])) - 1e-6) + frame;
    if (area > best.area) best = { area, rows, columns, wide: most(0), high: most(1) };
  }
  $("grid").style.gridTemplate = `repeat(${best.rows}, ${best.high}px) / repeat(${best.columns}, ${best.wide}px)`;
  document.body.classList.toggle("column", best.columns === 1);
}

new ResizeObserver(arrange).observe($("grid"));
