// The clips of a ballot: all show one moment of one clock, and stop, step and slow down together.
//
// A clip is an image with all its frames on one sheet, larger than the box that it is seen through; `image.film` says
// how they lie: {frames, columns, rows, rate}.

const SLOW = 0.5;

export class Player {
  /** `changed` is called when what the buttons say may have changed. */
  constructor(changed) {
    this.changed = changed;
    this.films = [];
    this.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.slow = false;
    this.seconds = 0;
    this.before = null;
    this.running = false;
  }

  /** Plays the clips among these images from their beginning. */
  show(images) {
    this.films = images.filter((image) => image.film);
    this.seconds = 0;
    this.before = null;
    this.#draw();
    this.#run();
    this.changed();
  }

  toggle() {
    this.playing = !this.playing;
    this.#run();
    this.changed();
  }

  /** Stops, and goes to the next frame of the fastest clip. */
  step() {
    if (!this.films.length) return;
    const rate = Math.max(...this.films.map(({ film }) => film.rate));
    this.playing = false;
    this.seconds = (Math.floor(this.seconds * rate + 1e-6) + 1) / rate;
    this.#draw();
    this.changed();
  }

  slowDown() {
    this.slow = !this.slow;
    this.changed();
  }

  #run() {
    if (this.running || !this.playing || !this.films.length) return;
    this.running = true;
    this.before = null;
    const tick = (now) => {
      this.running = this.playing && this.films.length > 0;
      if (!this.running) return;
      if (this.before !== null) this.seconds += ((now - this.before) / 1000) * (this.slow ? SLOW : 1);
      this.before = now;
      this.#draw();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  /** All begin anew when the longest has ended; a shorter one waits with its last frame. */
  #draw() {
    const longest = Math.max(...this.films.map(({ film }) => film.frames / film.rate));
    if (this.films.length) this.seconds %= longest;
    for (const image of this.films) {
      const { frames, columns, rate } = image.film;
      const frame = Math.min(frames - 1, Math.floor(this.seconds * rate + 1e-6));
      image.dataset.frame = frame;
      image.style.left = `${-100 * (frame % columns)}%`;
      image.style.top = `${-100 * Math.floor(frame / columns)}%`;
    }
  }
}

/** What is put into a box: the image itself, or a window on a clip's sheet. */
export function windowOn(image) {
  if (!image.film) return image;
  const box = document.createElement("span");
  box.className = "film";
  image.style.width = `${100 * image.film.columns}%`;
  image.style.height = `${100 * image.film.rows}%`;
  box.append(image);
  return box;
}
