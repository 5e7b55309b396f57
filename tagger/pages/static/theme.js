/** Light or dark: as Airflow shows itself where the page stands in its frame or beside it, else as the system does. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = new Set();
  const resolved = new Map();
  let probe = null;

  /** The root element of the Airflow page that frames this one; null where there is none that may be read. */
  function airflowRoot() {
    try {
      return parent !== window ? parent.document.documentElement : null;
    } catch {
      return null; // a frame of another origin
    }
  }

  /** What Airflow keeps where its pages are: "light", "dark" or "system"; null for a file or before it was chosen. */
  function kept() {
    try {
      return location.protocol === "file:" ? null : localStorage.getItem("theme");
    } catch {
      return null; // storage is not allowed
    }
  }

  function wanted() {
    const classes = airflowRoot()?.classList;
    if (classes?.contains("dark")) return "dark";
    if (classes?.contains("light")) return "light";
    const choice = kept();
    if (choice === "light" || choice === "dark") return choice;
    return system.matches ? "dark" : "light";
  }

  function show(theme) {
    if (root.dataset.theme === theme) return;
    root.dataset.theme = theme;
    resolved.clear();
    for (const listener of listeners) listener(theme);
  }

  const follow = () => show(wanted());

  /**
   * Return what a custom property of the style sheet is in the present theme, as `rgb(…)`: a canvas knows no variables.
   * @param {string} name such as `--spent`
   */
  function color(name) {
    if (!probe) {
      probe = document.createElement("i");
      probe.hidden = true;
      document.body.append(probe);
    }
    if (!resolved.has(name)) {
      probe.style.color = `var(${name})`;
      resolved.set(name, getComputedStyle(probe).color);
    }
    return resolved.get(name);
  }

  const frame = airflowRoot();
  if (frame) new MutationObserver(follow).observe(frame, { attributes: true, attributeFilter: ["class"] });
  system.addEventListener("change", follow);
  addEventListener("storage", follow);
  addEventListener("beforeprint", () => show("light"));
  addEventListener("afterprint", follow);
  follow();

  tagging.theme = { color, onChange: (listener) => listeners.add(listener) };
})(globalThis.tagging);
