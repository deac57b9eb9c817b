// A large run: images, texts and orders are scripts beside this page, as a page of a folder may read nothing else. Each calls
// genkit with its name and a text, which is parsed, never run.
const awaited = new Map(), HELD = 400;  // of files with images, those in memory
window.genkit = (name, text) => awaited.get(name)?.(text);
const read = (name) => new Promise((resolve, reject) => {
  const tag = make("script");
  const end = (act, value) => { awaited.delete(name); tag.remove(); act(value); };
  awaited.set(name, (text) => end(resolve, text));
  tag.onerror = tag.onload = () => end(reject, new Error(name));  // after its call nothing waits any more
  tag.src = `${large.folder}/${name}.js`;
  document.head.append(tag);
});
const once = (make, most = Infinity, memo = new Map()) => (key) => {
  const found = memo.get(key) || make(key);
  memo.delete(key);
  memo.set(key, found);
  if (memo.size > most) memo.delete(memo.keys().next().value);
  return found;
};
const bytes = (text) => {
  const plain = atob(text), found = new Uint8Array(plain.length);
  for (let n = 0; n < plain.length; n += 1) found[n] = plain.charCodeAt(n);
  return found;
};
const numbers = once(async (name) => new Uint32Array(bytes(await read(name)).buffer));
const states = once(async (name) => bytes(await read(name)));
const starts = once(async (name) => {  // where the images of each row begin
  const counts = await numbers(name), found = new Uint32Array(counts.length + 1);
  for (let n = 0; n < counts.length; n += 1) found[n + 1] = found[n] + counts[n];
  return found;
});
const texts = once(async (n) => `\n${JSON.parse(await read(`texts/${n}`))}\n`);  // a line a row: its id, a blank, its prompt
const lower = once(async (n) => (await texts(n)).toLowerCase());
const STATES = ["rejected", "kept", "failed"];

const shelf = once(async (n) => {
  const { rows, images, verdicts } = JSON.parse(await read(`images/${Math.floor(n / 1000)}/${n}`));
  const settings = new Map(rows.map(({ id, ...row }) => [id, row]));
  return images.map((image, k) => {
    const [kept, rank, reason, of, gone] = verdicts[k];
    const changed = gone ? { status: "failed", file: null } : {};
    return complete({ ...image, kept: Boolean(kept), rank: rank || null, reason, of, ...changed }, settings.get(image.id) || {}, n * large.chunk + k);
  });
}, HELD);

async function fetchImages(places) {
  const needed = [...new Set(Array.from(places, (place) => Math.floor(place / large.chunk)))];
  const found = new Map(await Promise.all(needed.map(async (n) => [n, await shelf(n)])));
  return Array.from(places, (place) => found.get(Math.floor(place / large.chunk))[place % large.chunk]);
}

async function chooseLarge(words, current) {
  const sort = $("sort").value, wanted = STATES.indexOf(state);
  const order = sort === "row" ? null : await numbers(`order/${sort}`);
  const of = wanted < 0 ? null : await states("states");
  const within = words.length ? await matching(words, current) : null;
  const found = new Uint32Array(total);
  let size = 0;
  for (let n = 0; n < total; n += 1) {
    const place = order ? order[n] : n;
    if ((!of || of[place] === wanted) && (!within || within[place])) found[size++] = place;
  }
  return found.subarray(0, size);
}

async function matching(words, current) {  // a 1 for each image whose row has every word
  const [word, ...others] = words.sort((a, b) => b.length - a.length), begin = await starts("counts");
  const found = new Uint8Array(total);
  for (let n = 0; n < large.texts && current(); n += 1) {
    const text = await lower(n);
    let row = n * large.lines, line = 1, end = text.indexOf("\n", 1);
    for (let hit = text.indexOf(word, 1); hit >= 0; hit = text.indexOf(word, end)) {
      for (; end < hit; row += 1) { line = end + 1; end = text.indexOf("\n", line); }
      const whole = text.slice(line, end);
      if (others.every((other) => whole.includes(other))) found.fill(1, begin[row], begin[row + 1]);
    }
  }
  return found;
}

async function findLarge(wanted) {  // the image of that name
  const [, id, index] = /^(.+)-(\d{2,})$/.exec(wanted) || [];
  const likely = large.first.findLastIndex((one) => one <= id);  // where rows are in the order of their ids
  for (const n of id ? new Set([Math.max(0, likely), ...large.first.keys()]) : []) {
    const text = await texts(n), at = text.indexOf(`\n${id} `);
    if (at < 0) continue;
    let row = n * large.lines;
    for (let end = text.indexOf("\n", 1); end >= 0 && end <= at; end = text.indexOf("\n", end + 1)) row += 1;
    const begin = await starts("counts"), places = Array.from({ length: begin[row + 1] - begin[row] }, (_, k) => begin[row] + k);
    const guess = places[Number(index)];
    const near = guess === undefined ? [] : await load([guess]);
    return near.find((image) => label(image) === wanted) || (await load(places)).find((image) => label(image) === wanted);
  }
  return undefined;
}

async function prepare() {  // reads what a first search needs, while nothing is asked for
  await Promise.all([states("states"), starts("counts")]);
  for (let n = 0; n < large.texts; n += 1) await lower(n);
  await Promise.all(["clip", "rank"].map((sort) => numbers(`order/${sort}`)));
}
