// The pictures and clips of a ballot: buttons of the largest size that fits, zoomed together, with marks on them.

import { windowOn } from "./player.js";

const GAP = 14;
const STEP = 0.05;
const ZOOM = 3;

export class Pictures {
  /** `box` holds the buttons, `board` says how they are shown. */
  constructor(box, board, words) {
    this.box = box;
    this.board = board;
    this.words = words;
    this.marks = [];
    this.cross = { x: 0.5, y: 0.5 };
    new ResizeObserver(() => this.layOut()).observe(box);
    box.addEventListener("pointermove", (event) => this.#follow(event));
    box.addEventListener("focusin", () => this.drawMarks());
  }

  get buttons() {
    return [...this.box.children];
  }

  /** Puts images (decoded) into the buttons; a button that is there stays, and keeps its focus. */
  show(images) {
    while (this.box.children.length > images.length) this.box.lastElementChild.remove();
    while (this.box.children.length < images.length) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "picture";
      this.box.append(button);
    }
    this.buttons.forEach((button, place) => {
      const image = images[place];
      image.alt = "";
      image.classList.toggle("pixels", widthOf(image) < 128);
      button.replaceChildren(windowOn(image));
      button.classList.remove("chosen");
      button.dataset.place = place;
    });
    this.marks = [];
    this.layOut();
  }

  /** The number of columns with which the pictures are largest, and each button as large as its picture. */
  layOut() {
    const images = this.buttons.map((button) => button.querySelector("img"));
    if (!images.length) return;
    const { width, height } = this.box.getBoundingClientRect();
    const ratio = ratioOf(images[0]);
    let best = { side: 0, columns: 1 };
    for (let columns = 1; columns <= images.length; columns += 1) {
      const rows = Math.ceil(images.length / columns);
      const across = (width - GAP * (columns - 1)) / columns;
      const down = (height - GAP * (rows - 1)) / rows;
      const side = Math.min(across, down * ratio);
      if (side > best.side) best = { side, columns, across, down };
    }
    const cell = Math.floor(Math.min(best.across, best.down * widest(images)));
    this.box.style.gridTemplateColumns = `repeat(${best.columns}, ${cell}px)`;
    const stacked = best.columns === 1;
    this.board.dataset.layout = stacked ? "column" : best.columns === images.length ? "row" : "grid";
    this.buttons.forEach((button, place) => {
      const image = images[place];
      const own = ratioOf(image);
      const across = snap(image, Math.floor(Math.min(best.across, best.down * own)));
      button.style.width = `${across}px`;
      button.style.height = `${Math.round(across / own)}px`;
    });
    const tallest = Math.max(...this.buttons.map((button) => parseFloat(button.style.height)));
    this.box.style.gridAutoRows = `${tallest}px`;
    this.drawMarks();
  }

  // --- zoom ---

  get zoomed() {
    return this.board.dataset.zoom === "true";
  }

  zoom(on) {
    this.board.dataset.zoom = String(on);
    this.board.style.setProperty("--zoom", ZOOM);
    if (on) this.mark(false);
  }

  #follow(event) {
    const button = event.target.closest(".picture");
    if (!this.zoomed || !button) return;
    const box = button.getBoundingClientRect();
    this.#moveTo((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }

  /** Moves all pictures by a step; `x` and `y` are -1, 0 or 1. */
  pan(x, y) {
    const now = this.at ?? { x: 0.5, y: 0.5 };
    this.#moveTo(now.x + x * 2 * STEP, now.y + y * 2 * STEP);
  }

  #moveTo(x, y) {
    this.at = { x: clamp(x), y: clamp(y) };
    this.board.style.setProperty("--zoom-x", `${this.at.x * 100}%`);
    this.board.style.setProperty("--zoom-y", `${this.at.y * 100}%`);
  }

  // --- marks: [place, x, y] ---

  get marking() {
    return this.board.dataset.marking === "true";
  }

  mark(on) {
    this.board.dataset.marking = String(on);
    if (on) {
      this.zoom(false);
      this.cross = { x: 0.5, y: 0.5 };
      if (!this.box.contains(document.activeElement)) this.buttons[0]?.focus();
    }
    this.drawMarks();
  }

  /** Where a click went, as [place, x, y]. */
  placeOf(button, event) {
    const box = button.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    return [Number(button.dataset.place), clamp(x), clamp(y)];
  }

  /** The cross of the picture that has the focus, as [place, x, y]; null where none has. */
  crossPlace() {
    const button = document.activeElement?.closest?.(".picture");
    return button ? [Number(button.dataset.place), this.cross.x, this.cross.y] : null;
  }

  moveCross(x, y) {
    this.cross = { x: clamp(this.cross.x + x * STEP), y: clamp(this.cross.y + y * STEP) };
    this.drawMarks();
  }

  /** Sets a mark, or takes away the one that is there. True where one was set. */
  toggleMark([place, x, y]) {
    const near = this.marks.findIndex(
      ([other, left, top]) => other === place && Math.hypot(left - x, top - y) < 0.04,
    );
    if (near >= 0) this.marks.splice(near, 1);
    else if (this.marks.length < 60) this.marks.push([place, x, y]);
    this.drawMarks();
    return near < 0;
  }

  drawMarks() {
    for (const old of this.box.querySelectorAll(".dot, .cross")) old.remove();
    for (const [place, x, y] of this.marks) this.#put("dot", this.buttons[place], x, y);
    const focused = document.activeElement?.closest?.(".picture");
    if (this.marking && focused?.matches(":focus-visible")) {
      this.#put("cross", focused, this.cross.x, this.cross.y);
    }
  }

  #put(kind, button, x, y) {
    if (!button) return;
    const dot = document.createElement("span");
    dot.className = kind;
    dot.style.left = `${x * 100}%`;
    dot.style.top = `${y * 100}%`;
    button.append(dot);
  }
}

/** Of a clip's sheet a frame's. */
function widthOf(image) {
  return image.naturalWidth / (image.film?.columns ?? 1);
}

function ratioOf(image) {
  return widthOf(image) / (image.naturalHeight / (image.film?.rows ?? 1)) || 1;
}

/** A width at which each pixel of a small picture is as wide as the others, where that costs little. */
function snap(image, across) {
  const unit = widthOf(image) / devicePixelRatio;
  const even = Math.floor(across / unit) * unit;
  return image.classList.contains("pixels") && even > 0.9 * across ? even : across;
}

function widest(images) {
  return Math.max(...images.map(ratioOf));
}

function clamp(share) {
  return Math.min(1, Math.max(0, share));
}
