// What the page says to its server: JSON, asked again until there is an answer. Nothing here knows what is shown.

const MAX_WAIT_MS = 8000;

let said = () => {};

/** Calls `heard(true)` while the server cannot be reached and `heard(false)` once it can. */
export function onLost(heard) {
  said = heard;
}

/** A name for a click: the same one again means the same click. */
export function makeNonce() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** {status, body} of the answer; asks again after a lost connection, a fault of the server and "too fast". */
export async function ask(method, path, body) {
  for (let attempt = 0; ; attempt += 1) {
    const answer = await askOnce(method, path, body);
    if (answer !== null) {
      said(false);
      return answer;
    }
    if (attempt > 0) said(true);
    await pause(Math.min(MAX_WAIT_MS, 300 * 2 ** attempt));
  }
}

async function askOnce(method, path, body) {
  try {
    const answer = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      redirect: "error",
    });
    if (answer.status >= 500 || answer.status === 429) return null;
    return { status: answer.status, body: await answer.json() };
  } catch {
    return null;
  }
}

/** Waits, but not longer than until the browser is online again. */
function pause(milliseconds) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      resolve();
    };
    const timer = setTimeout(end, milliseconds);
    addEventListener("online", end);
  });
}

// --- what outlives a reload ---------------------------------------------------------------------

const KEPT = "rlalign-vote:unsent";

/** Keeps a vote until it is answered; null forgets it. */
export function keepUnsent(vote) {
  try {
    if (vote === null) localStorage.removeItem(KEPT);
    else localStorage.setItem(KEPT, JSON.stringify(vote));
  } catch {
    // no storage: a reload loses what was never answered
  }
}

/** The vote that was not answered before the page was left, or null. */
export function unsent() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

// --- pictures and events ------------------------------------------------------------------------

const ahead = new Map();
const clips = new Set();

/** Keys of clips, which are loaded as sheets of frames. */
export function noteClips(keys) {
  for (const key of keys) clips.add(key);
}

/** Has pictures fetched and decoded that will be needed; those of before are let go. */
export function fetchAhead(keys) {
  for (const key of ahead.keys()) {
    if (!keys.includes(key)) ahead.delete(key);
  }
  for (const key of keys) {
    if (!ahead.has(key)) ahead.set(key, loadPicture(key).catch(() => ahead.delete(key)));
  }
}

/** The image of a key, decoded; of a clip the sheet of its frames, with `film`. Throws where it cannot be had. */
export async function loadPicture(key) {
  const image = new Image();
  image.decoding = "async";
  image.draggable = false;
  if (clips.has(key)) {
    // the sheet comes from the browser's cache afterwards
    const address = `/film/${encodeURIComponent(key)}`;
    const answer = await fetch(address, { credentials: "same-origin" });
    if (!answer.ok) throw new Error(`film: ${answer.status}`);
    await answer.blob();
    const [frames, columns, rate] = ["frames", "columns", "rate"].map((name) => Number(answer.headers.get(`x-${name}`)));
    image.film = { frames, columns, rate, rows: Math.ceil(frames / columns) };
    image.src = address;
  } else {
    image.src = `/picture/${encodeURIComponent(key)}`;
  }
  await image.decode();
  return image;
}

/** Calls `heard(progress)` whenever the server has news, while the page is visible. */
export function listen(heard) {
  let source = null;
  const follow = () => {
    if (document.visibilityState === "visible" && source === null) {
      source = new EventSource("/progress");
      source.onmessage = (event) => heard(JSON.parse(event.data));
    } else if (document.visibilityState !== "visible" && source !== null) {
      source.close();
      source = null;
    }
  };
  document.addEventListener("visibilitychange", follow);
  addEventListener("pagehide", () => source?.close());
  follow();
}
