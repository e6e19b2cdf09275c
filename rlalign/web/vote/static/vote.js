// The page where people choose. A ballot comes from the server, is shown, and goes back as a choice; the answer to a
// choice is the next ballot, whose pictures are here already.
//
//   starting -> joining | waiting | loading -> shown -> open -> sending -> loading | waiting
//
// Only an open ballot takes a choice: what is clicked or pressed in another state does nothing.

import { Pictures } from "./pictures.js";
import { Player } from "./player.js";
import { ask, fetchAhead, keepUnsent, listen, loadPicture, makeNonce, noteClips, onLost, unsent } from "./talk.js";
import { Watch, seen } from "./watch.js";

const OPEN_AFTER_MS = 200; // nobody decides sooner; what comes sooner was meant for the pictures before
const ASK_AGAIN_MS = 5000;
const LONG_PROMPT = 90; // characters

const page = JSON.parse(document.getElementById("page-data").textContent);
const words = page.words;
const part = (name) => document.getElementById(name);
const board = part("board");
const pictures = new Pictures(part("pictures"), board, words);
const player = new Player(drawPlayer);
const watch = new Watch();

let state = "starting";
let ballot = null;
let nonce = "";
let ranking = [];
let placedItself = null;
let loadMs = 0;
let turn = 0;
let pointer = "mouse";
let token = "";
let following = false;
let timer = 0;

function fill(text, values = {}) {
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** Has a screen reader say it. */
function say(text) {
  part("live").textContent = "";
  requestAnimationFrame(() => (part("live").textContent = text));
}

function setState(to) {
  state = to;
  document.body.dataset.state = to;
  board.dataset.open = String(to === "open");
  part("pictures").setAttribute("aria-busy", String(to === "loading" || to === "sending"));
  for (const button of board.querySelectorAll("[data-choice], [data-reason]")) {
    button.setAttribute("aria-disabled", String(to !== "open"));
  }
}

function showOnly(name) {
  for (const one of ["join", "wait", "board"]) part(one).hidden = one !== name;
  if (part("ask")) part("ask").hidden = name === "join";
}

// --- joining --------------------------------------------------------------------------------------

async function start() {
  // the token of a join link is taken out of the address, and kept for a reload of the form alone
  const found = /^#join=([\w.-]+)$/.exec(location.hash);
  token = found ? found[1] : (sessionStorage.getItem("join") ?? "");
  if (found) {
    sessionStorage.setItem("join", token);
    history.replaceState(null, "", location.pathname);
  }
  if (found && !page.consent) await join("");
  else if (found) showJoin();
  else await enter();
}

async function enter() {
  const kept = unsent();
  const answer = kept ? await deliver(kept) : await ask("GET", "/ballot");
  if (answer.status !== 401 && answer.body.waiting !== "join") return take(answer);
  if (!page.with_token && !page.consent) return join("");
  return showJoin();
}

function showJoin(message = "") {
  setState("joining");
  showOnly("join");
  part("progress").hidden = true;
  if (page.with_token && !token) message = message || words.needs_link;
  part("join-error").textContent = message;
  part("join-error").hidden = !message;
  part("join-name").focus();
}

async function join(name) {
  const answer = await ask("POST", "/join", { token, name, consent: page.consent_version });
  if (answer.status !== 200) return showJoin(answer.body.code === "join" ? words.needs_link : wordsOf(answer));
  sessionStorage.removeItem("join");
  return take(await ask("GET", "/ballot"));
}

// --- what the server says -------------------------------------------------------------------------

function wordsOf(answer) {
  return words[`error_${answer.body.code}`] ?? words.error_other;
}

/** Goes on with an answer of /ballot, /undo or /prompts: a ballot, a reason to wait, or a refusal. */
function take(answer, heard = "") {
  if (answer.status === 401 || answer.body.waiting === "join") return showJoin(words.error_join);
  if (answer.status >= 400) {
    say(wordsOf(answer));
    if (answer.body.code === "left_out") return showWaiting({ waiting: "left_out", progress: {}, ahead: [] });
    return refresh(wordsOf(answer));
  }
  if (!following) {
    following = true;
    listen(hear);
  }
  return answer.body.waiting ? showWaiting(answer.body) : showBallot(answer.body, heard);
}

async function refresh(heard = "") {
  const answer = await ask("GET", "/ballot");
  if (answer.status < 400 || answer.status === 401) return take(answer, heard);
  return showWaiting({ waiting: answer.body.code, progress: {}, ahead: [] });
}

function hear(progress) {
  showProgress(progress);
  if (state === "waiting") refresh();
}

function showProgress(progress) {
  if (progress.done === undefined) return;
  const parts = [fill(progress.of ? words.progress : words.progress_open, progress)];
  if (progress.round !== null) {
    const [first, last] = progress.votes ?? [];
    parts.push(fill(progress.votes ? words.round_votes : words.round, { ...progress, first, last }));
  }
  part("progress").hidden = false;
  part("progress").firstElementChild.hidden = !progress.of;
  part("progress-done").style.transform = `scaleX(${progress.of ? Math.min(1, progress.done / progress.of) : 0})`;
  part("progress-words").textContent = parts.join(" · ");
}

function showWaiting(found) {
  turn += 1;
  setState("waiting");
  showOnly("wait");
  ballot = null;
  watch.stop();
  fetchAhead(found.ahead);
  showProgress(found.progress);
  const values = { ...found.progress, words: found.words };
  const code = found.waiting === "empty" && !found.progress.done ? "nothing" : found.waiting;
  const title = words[`wait_${code}`] ?? words[`error_${found.waiting}`] ?? words.error_other;
  const text = fill(words[`wait_${code}_words`] ?? "", values);
  const counted = found.waiting === "drawing" && found.progress.to_make > 0;
  const count = { made: found.progress.made, of: found.progress.to_make };
  if (part("wait-title").textContent !== title) say(`${title}. ${text}`);
  part("wait-title").textContent = title;
  part("wait-words").textContent = counted ? `${text} ${fill(words.wait_drawing_count, count)}` : text;
  part("wait-made").hidden = !counted;
  part("wait-made").max = count.of || 1;
  part("wait-made").value = count.made ?? 0;
  part("wait-more").hidden = !found.progress.done;
  if (found.waiting === "prompt") part("ask-text")?.focus();
  clearTimeout(timer);
  if (found.waiting !== "prompt" && found.waiting !== "left_out") {
    timer = setTimeout(() => state === "waiting" && refresh(), ASK_AGAIN_MS);
  }
}

// --- a ballot -------------------------------------------------------------------------------------

async function showBallot(found, heard) {
  // the pictures of before stay until those of this ballot can be drawn
  const mine = ++turn;
  const arrived = performance.now();
  clearTimeout(timer);
  setState("loading");
  showOnly("board");
  showProgress(found.progress);
  noteClips(found.clips);
  let images;
  try {
    images = await Promise.all(found.pictures.map(loadPicture));
  } catch {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    return mine === turn ? refresh() : undefined;
  }
  if (mine !== turn) return undefined;

  // all at once
  ballot = found;
  nonce = makeNonce();
  ranking = [];
  showPrompt(found.prompt);
  pictures.show(images);
  player.show(images);
  showQuestion(player.films.length > 0);
  pictures.zoom(false);
  pictures.mark(false);
  for (const button of board.querySelectorAll("[data-reason]")) button.setAttribute("aria-pressed", "false");
  for (const button of board.querySelectorAll("[data-choice]")) {
    button.hidden = !found.allowed.includes(button.dataset.choice);
  }
  drawState();
  setState("shown");
  await seen();
  if (mine !== turn) return undefined;
  loadMs = performance.now() - arrived;
  watch.start();
  fetchAhead(found.ahead);
  say([heard, fill(words.now_prompt, found)].filter(Boolean).join(" "));
  setTimeout(() => mine === turn && setState("open"), OPEN_AFTER_MS);
  return undefined;
}

/** A long prompt is written smaller; one that has to be scrolled can be reached by Tab. */
function showPrompt(text) {
  const prompt = part("prompt");
  prompt.textContent = text;
  prompt.classList.toggle("long", text.length > LONG_PROMPT);
  prompt.scrollTop = 0;
  if (prompt.scrollHeight > prompt.clientHeight + 1) prompt.tabIndex = 0;
  else prompt.removeAttribute("tabindex");
}

/** Clips are asked about as clips. */
function showQuestion(ofClips) {
  const ranked = page.mode === "rank";
  const ofPictures = ranked ? words.question_rank : words.question;
  const asked = ranked ? words.question_rank_clips : words.question_clips;
  board.querySelector(".ask-line").textContent = ofClips ? asked : ofPictures;
  board.setAttribute("aria-label", ofClips ? words.ballot_clips : words.ballot);
}

function drawPlayer() {
  part("player").hidden = !player.films.length;
  if (player.films.length) document.body.dataset.clips = "";
  part("play-word").textContent = player.playing ? words.pause : words.play;
  board.querySelector('[data-do="slow"]').setAttribute("aria-pressed", String(player.slow));
}

/** What follows from what was pressed: names of pictures, ranks, pressed buttons. */
function drawState() {
  const count = pictures.buttons.length;
  pictures.buttons.forEach((button, place) => {
    const rank = ranking.indexOf(place) + 1;
    const values = { place: place + 1, count, rank };
    button.setAttribute("aria-label", fill(labelOf(place, rank), values));
    if (page.mode === "rank") drawRank(button, place, rank);
  });
  for (const [name, on] of [["zoom", pictures.zoomed], ["mark", pictures.marking]]) {
    board.querySelector(`[data-do="${name}"]`)?.setAttribute("aria-pressed", String(on));
  }
  const send = board.querySelector('[data-choice="rank"]');
  if (send) send.disabled = ranking.length !== count;
}

function labelOf(place, rank) {
  const ofClips = player.films.length > 0;
  if (pictures.marking) return ofClips ? words.clip_mark : words.picture_mark;
  if (page.mode === "rank") {
    if (rank) return ofClips ? words.clip_placed : words.picture_placed;
    return ofClips ? words.clip_place : words.picture_place;
  }
  if (place === 0) return ofClips ? words.clip_left : words.picture_left;
  return ofClips ? words.clip_right : words.picture_right;
}

function drawRank(button, place, rank) {
  for (const old of button.querySelectorAll(".badge, .medal")) old.remove();
  const badge = document.createElement("span");
  badge.className = rank ? "medal" : "badge";
  badge.textContent = rank ? fill(words.rank, { rank }) : place + 1;
  button.append(badge);
}

/** Puts a picture next in the ranking, or takes it back; the last one places itself. */
function place(number) {
  if (state !== "open" || number >= pictures.buttons.length) return;
  const isAlone = number === placedItself;
  placedItself = null;
  if (isAlone) return; // who places all of them by hand means the same
  if (ranking.includes(number)) ranking = ranking.filter((one) => one !== number);
  else ranking.push(number);
  const left = pictures.buttons.map((_, one) => one).filter((one) => !ranking.includes(one));
  if (left.length === 1 && ranking.at(-1) === number) {
    placedItself = left[0];
    ranking.push(placedItself);
  }
  drawState();
}

async function choose(choice, input) {
  if (state !== "open" || !ballot.allowed.includes(choice)) return;
  if (choice === "rank" && ranking.length !== pictures.buttons.length) return;
  const vote = describe(choice, input);
  setState("sending");
  const side = { left: 0, right: 1 }[choice];
  if (side !== undefined) pictures.buttons[side].classList.add("chosen");
  watch.stop();
  keepUnsent(vote);
  const answer = await deliver(vote);
  take(answer, answer.heard ?? "");
}

function describe(choice, input) {
  const device = { input, layout: board.dataset.layout, width: widthClass(), theme: themeNow() };
  const reasons = [...board.querySelectorAll('[data-reason][aria-pressed="true"]')];
  return {
    ballot: ballot.ballot,
    nonce,
    choice,
    ranking: choice === "rank" ? ranking : [],
    reasons: reasons.map((button) => button.dataset.reason),
    points: pictures.marks.map(([where, x, y]) => [where, round(x), round(y)]),
    visible_ms: Math.round(watch.visible),
    decide_ms: Math.round(watch.decide),
    device: { ...device, load_ms: Math.round(loadMs), zoomed: pictures.zoomed ? "yes" : "no" },
  };
}

const round = (share) => Math.round(share * 10000) / 10000;
const widthClass = () => (innerWidth < 640 ? "narrow" : innerWidth < 1100 ? "medium" : "wide");

/** Sends a vote until it is answered. Gives what comes next, as /ballot would, and what to say. */
async function deliver(vote) {
  const answer = await ask("POST", "/vote", vote);
  keepUnsent(null);
  if (answer.status !== 200) return answer.status === 401 ? answer : { ...answer, heard: wordsOf(answer) };
  const again = answer.body.status === "again";
  const names = sayNames(vote.choice, answer.body.names);
  showNames(names);
  const heard = [again ? words.said_again : words.saved, names].filter(Boolean).join(" ");
  const next = answer.body.next;
  return { status: next.waiting ? 202 : 200, body: next, heard };
}

function sayNames(choice, names) {
  if (names.length !== 2) return "";
  const [left, right] = names;
  if (choice === "left") return fill(words.names_of_choice, { chosen: left, other: right });
  if (choice === "right") return fill(words.names_of_choice, { chosen: right, other: left });
  return fill(words.names_of_none, { left, right });
}

function showNames(text) {
  if (part("names")) part("names").textContent = text;
}

async function undo() {
  if (state !== "open" && state !== "waiting") return;
  setState("sending");
  const answer = await ask("POST", "/undo", { nonce: makeNonce() });
  showNames("");
  const prompt = answer.body.prompt ?? "";
  take(answer, answer.status === 200 ? fill(words.back_again, { prompt }) : "");
}

async function askFor(text) {
  if (state !== "open" && state !== "waiting") return;
  const before = state;
  setState("sending");
  const answer = await ask("POST", "/prompts", { text });
  const refused = answer.status >= 400 && answer.status !== 401;
  part("ask-error").textContent = refused ? wordsOf(answer) : "";
  part("ask-error").hidden = !refused;
  if (refused) return setState(before);
  if (part("ask-text")) part("ask-text").value = "";
  document.activeElement?.blur();
  return take(answer);
}

// --- hands ----------------------------------------------------------------------------------------

function toggleReason(button) {
  if (state !== "open") return;
  button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
}

function setMark(where) {
  if (state !== "open" || where === null) return;
  say(pictures.toggleMark(where) ? words.marked : words.unmarked);
}

const deeds = {
  undo,
  zoom() {
    pictures.zoom(!pictures.zoomed);
    drawState();
  },
  mark() {
    pictures.mark(!pictures.marking);
    drawState();
  },
  play: () => player.toggle(),
  step: () => player.step(),
  slow: () => player.slowDown(),
  back() {
    if (ranking.at(-1) === placedItself) ranking = ranking.slice(0, -1);
    ranking = ranking.slice(0, -1);
    placedItself = null;
    drawState();
  },
};

addEventListener("pointerdown", (event) => (pointer = event.pointerType || "mouse"), true);

part("pictures").addEventListener("click", (event) => {
  const button = event.target.closest(".picture");
  if (!button || event.detail > 1) return;
  const input = event.detail === 0 ? "key" : pointer;
  const number = Number(button.dataset.place);
  if (pictures.marking) setMark(input === "key" ? pictures.crossPlace() : pictures.placeOf(button, event));
  else if (pictures.zoomed && input === "touch") return; // a finger moves what is enlarged
  else if (page.mode === "rank") place(number);
  else choose(number === 0 ? "left" : "right", input);
});

board.addEventListener("click", (event) => {
  const button = event.target.closest("[data-choice], [data-reason], [data-do]");
  if (!button || event.detail > 1) return;
  const input = event.detail === 0 ? "key" : pointer;
  if (button.dataset.choice) choose(button.dataset.choice, input);
  else if (button.dataset.reason) toggleReason(button);
  else deeds[button.dataset.do]();
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const SIDES = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "both_bad", ArrowDown: "tie" };
const LETTERS = { s: () => choose("skip", "key"), u: undo, z: deeds.zoom, m: deeds.mark, n: () => askFor("") };
Object.assign(LETTERS, { ",": deeds.play, ".": deeds.step, "-": deeds.slow });

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  if (pressed(event)) event.preventDefault();
});

/** Does what a key means; false where it means nothing here. */
function pressed(event) {
  const arrow = ARROWS[event.key];
  if (event.key === "?") return showHelp();
  if (!part("letters").checked) return false;
  if (event.key === "Escape" && (pictures.zoomed || pictures.marking)) {
    pictures.zoom(false);
    pictures.mark(false);
    return drawState() ?? true;
  }
  if (arrow && pictures.marking) return pictures.moveCross(...arrow) ?? true;
  if (arrow && event.shiftKey) return pictures.zoomed && (pictures.pan(...arrow) ?? true);
  if (event.repeat) return Boolean(arrow);
  if (arrow && page.mode !== "rank") return choose(SIDES[event.key], "key") && true;
  return pressedRank(event) || pressedLetter(event.key.toLowerCase());
}

function pressedRank(event) {
  if (page.mode !== "rank") return false;
  if (/^[1-6]$/.test(event.key)) return place(Number(event.key) - 1) ?? true;
  if (event.key === "Backspace") return deeds.back() ?? true;
  const onButton = event.target.closest?.("button");
  if (event.key === "Enter" && (!onButton || onButton.dataset.choice === "rank")) return choose("rank", "key") && true;
  return false;
}

function pressedLetter(key) {
  const reason = board.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (reason) return toggleReason(reason) ?? true;
  const deed = LETTERS[key];
  const plays = player.films.length > 0;
  const shown = { m: page.points, n: page.mode === "chain", ",": plays, ".": plays, "-": plays }[key] ?? true;
  if (!deed || !shown) return false;
  deed();
  return true;
}

function showHelp() {
  part("help-box").showModal();
  return true;
}

part("help").addEventListener("click", showHelp);
part("wait-undo").addEventListener("click", undo);
part("join").addEventListener("submit", (event) => {
  event.preventDefault();
  join(part("join-name").value);
});
part("ask")?.addEventListener("submit", (event) => {
  event.preventDefault();
  if (part("ask-text").value.trim()) askFor(part("ask-text").value);
});
part("ask-next")?.addEventListener("click", () => askFor(""));

// --- the page itself ------------------------------------------------------------------------------

function themeNow() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  return document.documentElement.dataset.theme || dark;
}

function remember(name, value) {
  document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=strict`;
}

part("theme").addEventListener("click", () => {
  const theme = themeNow() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  remember("theme", theme);
});

part("language").addEventListener("change", (event) => {
  remember("lang", event.target.value);
  location.reload();
});

onLost((lost) => (part("lost").hidden = !lost));

// another tab may have answered what this one shows
document.addEventListener("visibilitychange", async () => {
  if (document.visibilityState !== "visible" || state !== "open") return;
  const mine = turn;
  const answer = await ask("GET", "/ballot");
  if (mine === turn && state === "open" && answer.body.ballot !== ballot.ballot) take(answer);
});
addEventListener("pageshow", (event) => event.persisted && refresh());

start();
