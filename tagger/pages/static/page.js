/** The page as a whole: which part of it is shown, and what is said where that fails. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, note, home, airflowLink, airflowUrl, leave } = tagging.dom;
  const { time } = tagging.format;

  const { Problem } = tagging.source;

  const AGAIN = 5_000;
  const SEEN_FIRST = 2; // charts

  let source = null;
  let leaving = new AbortController();
  let shown = null;

  const main = () => document.getElementById("main");

  /** @param {[string, string|null][]} steps name and address, the last one without */
  function crumbs(...steps) {
    const items = steps.map(([name, href]) =>
      h(
        "li",
        null,
        href ? h("a", { href, onclick: inTab() ? leave : null }, name) : h("span", { "aria-current": "page" }, name),
      ),
    );
    document
      .getElementById("top")
      .replaceChildren(
        ...(items.length ? [h("nav.crumbs", { "aria-label": "Breadcrumb" }, h("ol", null, items))] : []),
      );
  }

  /** Boxes of about the size of what comes, so that nothing jumps. `kind` is "cards" or "panels". */
  function waiting(kind) {
    const boxes = Array.from({ length: 4 }, () => h(`div.ghost.of-${kind}`));
    return [h("p.sr", { role: "status" }, "Loading"), h("div.ghost.of-title"), h(`div.${kind}`, null, boxes)];
  }

  /** Replace what is shown. Focus goes to the new heading, or stays where it was on the same page. */
  function put(place, content) {
    const key = document.activeElement?.dataset.key;
    const moved = shown !== null && shown !== place;
    main().replaceChildren(...content.filter(Boolean));
    main().removeAttribute("aria-busy");
    document.title = main().querySelector("h1")?.textContent ?? "Tagging";
    if (moved) scrollTo(0, 0);
    if (moved) main().querySelector("h1")?.focus({ preventScroll: true });
    else if (key)
      main()
        .querySelector(`[data-key="${CSS.escape(key)}"]`)
        ?.focus({ preventScroll: true });
    shown = place;
  }

  function fail(place, error) {
    const { title = "The page could not be drawn", message } = error;
    if (!(error instanceof Problem)) console.error(error);
    const again = h("button", { type: "button", onclick: route }, "Try again");
    const login = source.embedded ? null : airflowLink("", "Open Airflow");
    tagging.charts.clear();
    put(place, [h("h1.sr", { tabindex: -1 }, title), note("bad", title, message, h("p.actions", null, again, login))]);
  }

  async function overview(signal) {
    crumbs();
    if (shown !== "overview") main().replaceChildren(...waiting("cards"));
    const cards = await source.cards(signal);
    tagging.charts.clear();
    put("overview", tagging.overview.render(cards, { now: source.now(), embedded: source.embedded }));
  }

  async function dataset(dagId, query, signal) {
    const place = `d/${dagId}`;
    crumbs(
      ...(source.only
        ? []
        : [
            ["Tagging", "#/"],
            [dagId, null],
          ]),
    );
    if (shown === place) main().setAttribute("aria-busy", "true");
    else main().replaceChildren(...waiting("panels"));
    const chosen = query.has("from") || query.has("to") ? tagging.days.range(query.get("from"), query.get("to")) : null;
    const range = chosen?.error ? null : chosen;
    const page = await source.dataset(dagId, range, signal);
    tagging.charts.clear();
    const { content, charts } = tagging.dataset.render(page, range, {
      now: source.now(),
      embedded: source.embedded,
      error: chosen?.error,
    });
    put(place, content);
    if (!source.only) crumbs(["Tagging", "#/"], [page.card.dataset, null]);
    await draw(charts);
  }

  /** Draw what is seen first at once, the others one by one, so that the page answers meanwhile. */
  async function draw(charts) {
    for (const [index, chart] of charts.entries()) {
      if (index >= SEEN_FIRST) await new Promise((resume) => setTimeout(resume));
      if (chart.element.isConnected) chart.draw();
    }
  }

  /** Whether this is the tab of a run in Airflow, whose frame is no place for the other pages. */
  function inTab() {
    try {
      return parent !== window && parent.location.pathname.includes("/runs/");
    } catch {
      return false; // a frame of another origin
    }
  }

  /** The address of the overview or of a dataset, from the page of a run. */
  const outward = (hash) => (inTab() ? airflowUrl(`plugin/tagging${home().pathname}${hash}`) : `${home()}${hash}`);

  async function run(dagId, runId, signal) {
    const { content, update } = tagging.run.page();
    const trouble = h("div");
    document.body.classList.toggle("tab", inTab());
    crumbs(["Tagging", outward("#/")], [dagId, outward(tagging.overview.hrefOf(dagId))], [runId, null]);
    main().replaceChildren(...waiting("panels"));
    const load = () => source.run(dagId, runId, signal);
    update(await load());
    put("run", [...content, trouble]);
    await follow(load, update, trouble, signal);
  }

  /** Ask again every few seconds while the run goes on and somebody looks, as long as that is of use. */
  async function follow(load, update, trouble, signal) {
    while (!signal.aborted && document.querySelector('.live[data-state="running"]')) {
      await new Promise((resume) => setTimeout(resume, AGAIN));
      if (document.hidden)
        await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
      try {
        update(await load());
        trouble.replaceChildren();
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        const next = error.isFinal ? "." : "; it is tried again.";
        trouble.replaceChildren(
          note("warn", error.title, `${error.message} The figures are those of the last answer${next}`),
        );
        if (error.isFinal) return;
      }
    }
  }

  /** Keep Airflow's address in step with this frame's, so that it can be kept and sent; Airflow reads it so itself. */
  function mirror() {
    try {
      if (parent === window || !parent.location.pathname.endsWith(location.pathname)) return;
      parent.history.replaceState(
        parent.history.state,
        "",
        parent.location.pathname + parent.location.search + location.hash,
      );
    } catch {
      // a frame of another origin
    }
  }

  async function route() {
    leaving.abort();
    leaving = new AbortController();
    const { signal } = leaving;
    const ofRun = source.embedded ? null : location.pathname.match(/\/run\/([^/]+)\/([^/]+)\/?$/);
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const dagId = path.startsWith("d/") ? decode(path.slice(2)) : source.only;
    const place = ofRun ? "run" : dagId ? `d/${dagId}` : "overview";
    mirror();
    try {
      if (ofRun) await run(...ofRun.slice(1).map(decode), signal);
      else if (dagId) await dataset(dagId, new URLSearchParams(query), signal);
      else await overview(signal);
    } catch (error) {
      if (!signal.aborted) fail(place, error);
    }
  }

  function decode(part) {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  }

  function footer() {
    const made = source.generated ? ` Made ${time(source.generated, "UTC")} by tagger report --html.` : "";
    document
      .getElementById("foot")
      .append(
        h(
          "p",
          null,
          `Money is in US dollars. Saved is what asking for each row at once would have cost beyond what was spent.${made}`,
        ),
      );
  }

  function start() {
    source = tagging.source.open();
    footer();
    addEventListener("hashchange", route);
    route();
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})(globalThis.tagging);
