// How long pictures were seen: a clock that stands still while the page is hidden.

export class Watch {
  #from = 0;
  #sum = 0;
  #running = null;

  constructor() {
    document.addEventListener("visibilitychange", () => {
      if (this.#running === null && document.visibilityState === "visible" && this.#from) {
        this.#running = performance.now();
      } else if (this.#running !== null && document.visibilityState !== "visible") {
        this.#sum += performance.now() - this.#running;
        this.#running = null;
      }
    });
  }

  /** All pictures are decoded and the page is visible. */
  start() {
    this.#from = performance.now();
    this.#sum = 0;
    this.#running = this.#from;
  }

  stop() {
    this.#from = 0;
    this.#running = null;
  }

  /** Milliseconds since the first sight. */
  get decide() {
    return this.#from ? performance.now() - this.#from : 0;
  }

  /** Milliseconds of them in which the page was visible. */
  get visible() {
    return this.#sum + (this.#running === null ? 0 : performance.now() - this.#running);
  }
}

/** Waits until the page is visible and has drawn what it was given. */
export function seen() {
  return new Promise((resolve) => {
    const look = () => {
      if (document.visibilityState !== "visible") return;
      document.removeEventListener("visibilitychange", look);
      requestAnimationFrame(() => requestAnimationFrame(() => resolve()));
    };
    document.addEventListener("visibilitychange", look);
    look();
  });
}
