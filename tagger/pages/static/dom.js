/** The page's elements. Data becomes text nodes and attributes only, never markup. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const SHAPES = {
    check: "M3.5 8.5 6.5 11.5 12.5 5",
    cross: "M4.5 4.5 11.5 11.5M11.5 4.5 4.5 11.5",
    dots: "M3.5 8h.01M8 8h.01M12.5 8h.01",
    clock: "M8 4.5V8l2.5 1.5M14 8A6 6 0 1 1 2 8a6 6 0 0 1 12 0",
    play: "M5.5 4 12 8 5.5 12Z",
    dash: "M4 8h8",
    alert: "M8 2.5 14.5 13.5H1.5ZM8 6.5v3M8 11.6h.01",
    info: "M8 7.5v4M8 4.8h.01M14.5 8a6.5 6.5 0 1 1-13 0 6.5 6.5 0 0 1 13 0",
    up: "M8 13V3.5M4 7.5 8 3.5 12 7.5",
    down: "M8 3v9.5M4 8.5 8 12.5 12 8.5",
    out: "M9.5 3H13v3.5M13 3 7.5 8.5M11 9.5V13H3V5h3.5",
  };
  const STATES = {
    success: ["good", "check"],
    done: ["good", "check"],
    failed: ["bad", "cross"],
    broken: ["bad", "cross"],
    running: ["busy", "play"],
    deferred: ["busy", "clock"],
    retrying: ["busy", "clock"],
    queued: ["idle", "clock"],
    waiting: ["idle", "dots"],
    skipped: ["idle", "dash"],
    none: ["idle", "dash", "not run yet"],
  };

  /**
   * Make an element: `h("a.link", {href}, "text", child)`. Properties that begin with `on` are listeners, with `--` custom
   * properties of its style; the others are attributes. Children that are null are left out.
   * @returns {HTMLElement}
   */
  function h(name, properties, ...children) {
    const [tag, ...classes] = name.split(".");
    const element = document.createElement(tag);
    if (classes.length) element.className = classes.join(" ");
    for (const [key, value] of Object.entries(properties ?? {})) set(element, key, value);
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  function set(element, key, value) {
    if (value === null || value === undefined || value === false) return;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }

  /** A picture that only repeats what the words beside it say. */
  function icon(name) {
    const svg = document.createElementNS(SVG, "svg");
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", SHAPES[name]);
    svg.append(path);
    for (const [key, value] of Object.entries({ class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" })) {
      svg.setAttribute(key, value);
    }
    return svg;
  }

  /** A message, in which what stands in backticks is code. */
  const prose = (message) =>
    message.split(/`([^`]+)`/).map((part, index) => (index % 2 ? h("code", null, part) : part));

  /** A state in colour, form and word. */
  function pill(state) {
    const [kind, shape, word] = STATES[state] ?? ["idle", "dots"];
    return h(`span.pill.${kind}`, null, icon(shape), word ?? state);
  }

  /** A message in place: `kind` is "bad", "warn" or "info". */
  function note(kind, title, text, ...more) {
    const shape = kind === "info" ? "info" : "alert";
    return h(
      `div.note.${kind}`,
      { role: kind === "bad" ? "alert" : null },
      icon(shape),
      h("div", null, title && h("strong", null, title), text && h("p", null, prose(text)), ...more),
    );
  }

  /** A figure with its name and a word on it. */
  function tile(name, value, about, key) {
    const size = String(value).length > 10 ? "value.long" : "value";
    return h(
      "div.tile",
      { "data-figure": key },
      h("dt", null, name),
      h("dd", null, h(`span.${size}`, null, value), about && h("span.about", null, about)),
    );
  }

  /** Share of a whole as a bar; what it means stands beside it in words. */
  function bar(share, kind = "") {
    return h(
      "span.bar",
      { "aria-hidden": "true" },
      h("span", { class: kind, "--share": Math.max(0, Math.min(1, share)) }),
    );
  }

  /**
   * A table that scrolls in itself where it is too wide.
   * @param {string} caption
   * @param {{name: string, number?: boolean}[]} columns
   * @param {Array<Array<string|Node|{text: string, value: *}>>} rows whose first cell is the row's header
   */
  function table(caption, columns, rows, kind = "") {
    const head = columns.map(({ name, number }) => h("th", { scope: "col", class: number ? "number" : null }, name));
    const cell = (content, index) => {
      const { text, value } = content?.text !== undefined && !(content instanceof Node) ? content : { text: content };
      const properties = { class: columns[index].number ? "number" : null, "data-value": value };
      return index ? h("td", properties, text) : h("th", { scope: "row", ...properties }, text);
    };
    const body = rows.map((row) => h("tr", null, row.map(cell)));
    return h(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": caption },
      h(
        "table",
        { class: kind || null },
        h("caption", null, caption),
        h("thead", null, h("tr", null, head)),
        h("tbody", null, body),
      ),
    );
  }

  /** A part of the page with a heading of its own. */
  function panel(title, about, ...content) {
    return h("section.panel", null, h("h2", null, title), about && h("p.about", null, about), ...content);
  }

  /** Show the first rows of a long list, the others when asked. */
  function shortened(items, most, render, what) {
    const place = h("div");
    const show = (number) => {
      const more =
        items.length > number
          ? h("button.plain", { type: "button", onclick: () => show(items.length) }, `Show all ${items.length} ${what}`)
          : null;
      place.replaceChildren(render(items.slice(0, number)), ...(more ? [more] : []));
    };
    show(items.length > most + 2 ? most : items.length);
    return place;
  }

  /** The folder of this page's server, "<Airflow>/tagger/". */
  const home = () => new URL(document.documentElement.dataset.root || "./", location.href);

  /** Return where a path of Airflow's own pages is; null for a file, and for what is no path of it. */
  function airflowUrl(path) {
    if (location.protocol === "file:") return null;
    const root = new URL("../", home());
    const url = new URL(path.replace(/^\/+/, ""), root);
    return url.origin === root.origin && url.pathname.startsWith(root.pathname) ? url.href : null;
  }

  /**
   * Follow a link in the page that frames this one: Airflow's frame may neither move it nor open windows.
   * @param {MouseEvent} event
   */
  function leave(event) {
    if (parent === window || event.button > 1) return;
    const { href } = event.currentTarget;
    try {
      const link = parent.document.createElement("a");
      link.href = href;
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button === 1) link.target = "_blank";
      link.rel = "noopener";
      event.preventDefault();
      parent.document.body.append(link);
      link.click();
      link.remove();
    } catch {
      // a frame of another origin: the link is an ordinary one
    }
  }

  /** A link to a page of Airflow; its text alone where there is no Airflow, as in a file. */
  function airflowLink(path, ...content) {
    const href = airflowUrl(path);
    if (!href) return h("span", null, ...content);
    return h("a.out", { href, onclick: leave, onauxclick: leave }, ...content, icon("out"));
  }

  tagging.dom = {
    h,
    icon,
    prose,
    pill,
    note,
    tile,
    bar,
    table,
    panel,
    shortened,
    home,
    airflowLink,
    airflowUrl,
    leave,
  };
})(globalThis.tagging);
