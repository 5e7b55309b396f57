/** The page of one run: its figures, how far its shards are while it runs, what failed. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, pill, note, tile, panel, airflowLink } = tagging.dom;
  const { count, usd, percent, duration, rate, plural, short, known } = tagging.format;

  const STEP_OF_NEWS = 0.1; // a listener is told at each tenth, not every few seconds

  const ENDED = new Set(["done", "broken", "skipped"]);

  function head(run) {
    const title = h(
      "div.name",
      null,
      h("h1", { tabindex: -1 }, run.run_id),
      pill(run.state),
      run.dry_run && h("span.pill.idle", null, "dry run"),
    );
    const path = `dags/${encodeURIComponent(run.dag_id)}/runs/${encodeURIComponent(run.run_id)}`;
    return h(
      "div.title",
      null,
      title,
      h(
        "dl.line",
        null,
        h("div", null, h("dt", null, "Dataset"), h("dd", null, run.dataset)),
        run.day && h("div", null, h("dt", null, "Day"), h("dd", null, run.day)),
        h("div", null, h("dt", null, "In Airflow"), h("dd", null, airflowLink(path, "run"))),
      ),
    );
  }

  function notes(run) {
    return h(
      "div",
      null,
      run.problem && note("warn", "Not everything can be shown", run.problem),
      run.reason && note("bad", run.state === "failed" ? "The run failed" : "What went wrong", run.reason),
    );
  }

  /** "estimated $0.40, 5 % less" */
  function againstEstimate({ spent_usd: spent, estimated_usd: estimated }) {
    if (!known(estimated)) return null;
    if (!known(spent) || !spent) return `estimated ${usd(estimated)}`;
    const off = estimated / spent - 1;
    const told =
      Math.abs(off) < 0.01 ? "less than 1\u00a0% off" : `${percent(Math.abs(off))} ${off < 0 ? "less" : "more"}`;
    return `estimated ${usd(estimated)}, ${told}`;
  }

  function summary({ summary: s }) {
    if (!s) return null;
    const steps = Object.entries(s.seconds ?? {}).map(([step, seconds]) =>
      h("li", null, h("span", null, step), h("strong", null, duration(seconds))),
    );
    const left = ["skipped", "pending"].filter((name) => s[name]).map((name) => `${count(s[name])} ${name}`);
    return panel(
      "Summary",
      null,
      h(
        "dl.tiles",
        null,
        tile("Texts", count(s.texts), left.join(", ") || null, "texts"),
        tile("Cached", count(s.cached), s.texts ? `${percent(s.cached / s.texts)} of the texts` : null, "cached"),
        tile("Tagged", count(s.tagged), null, "tagged"),
        tile("Refused", count(s.refused), null, "refused"),
        tile("Failed", count(s.failed), null, "failed"),
        tile("Spent", usd(s.spent_usd), againstEstimate(s), "spent"),
        tile("Saved", usd(s.saved_usd), null, "saved"),
        tile(
          "Requests",
          count(s.requests),
          `${short(s.input_tokens)} tokens in, ${short(s.output_tokens)} out`,
          "requests",
        ),
      ),
      steps.length ? h("ul.steps", { "aria-label": "Time by step" }, steps) : null,
    );
  }

  function plan({ plan: p }) {
    if (!p) return null;
    const figure = (name, value, about) => tile(name, value, about);
    return panel(
      "Plan",
      null,
      h(
        "dl.tiles",
        null,
        figure("Rows", count(p.rows)),
        figure("Texts", count(p.texts), `${count(p.cached)} cached`),
        figure("New", count(p.new), plural(p.shards, "shard")),
        figure("Estimated", usd(p.estimated_usd), known(p.budget_usd) ? `budget ${usd(p.budget_usd)}` : "no budget"),
      ),
    );
  }

  /** The part of the texts that ended so, as one piece of a shard's bar. */
  const piece = (kind) => h(`span.${kind}`);

  /** A shard's line, which is brought up to date in place, so that focus and reading position stay. */
  function shardLine() {
    const pieces = { tagged: piece("tagged"), refused: piece("refused"), failed: piece("failed") };
    const [name, state, told, log] = [h("strong"), h("span.state"), h("span.told"), h("span.log")];
    const progress = h("div.progress", { role: "progressbar", "aria-valuemin": 0 }, Object.values(pieces));
    const element = h("li", null, h("div.first", null, name, state), progress, h("div.second", null, told, log));
    let before = "";
    const update = (shard) => {
      if (JSON.stringify(shard) === before) return;
      const url = before && JSON.parse(before).log_url;
      before = JSON.stringify(shard);
      name.textContent = shard.name;
      state.replaceChildren(pill(shard.state));
      for (const [kind, span] of Object.entries(pieces))
        span.style.setProperty("--share", shard.texts ? shard[kind] / shard.texts : 0);
      for (const [key, value] of [
        ["aria-label", shard.name],
        ["aria-valuemax", shard.texts],
        ["aria-valuenow", shard.done],
      ])
        progress.setAttribute(key, value);
      progress.setAttribute("aria-valuetext", `${count(shard.done)} of ${count(shard.texts)} texts`);
      told.textContent = describe(shard);
      if (shard.log_url && shard.log_url !== url)
        log.replaceChildren(airflowLink(shard.log_url, `Log of shard ${shard.shard}`));
    };
    return { element, update };
  }

  function describe(shard) {
    const parts = [`${count(shard.done)} of ${count(shard.texts)} texts`];
    for (const kind of ["refused", "failed"]) if (shard[kind]) parts.push(`${count(shard[kind])} ${kind}`);
    if (known(shard.spent_usd)) parts.push(usd(shard.spent_usd));
    if (known(shard.texts_per_second)) parts.push(`${rate(shard.texts_per_second)} texts/s`);
    if (shard.state === "running" && shard.texts_per_second > 0 && shard.done < shard.texts) {
      parts.push(`about ${duration((shard.texts - shard.done) / shard.texts_per_second)} left`);
    }
    if (shard.attempt > 1) parts.push(`attempt ${shard.attempt}`);
    return parts.join(" · ");
  }

  function shardsPanel() {
    const [list, overall, about] = [
      h("ul.shards"),
      h(
        "div.progress.overall",
        { role: "progressbar", "aria-label": "All shards", "aria-valuemin": 0 },
        piece("tagged"),
      ),
      h("p.about"),
    ];
    const element = panel("Shards", null, about, overall, list);
    const lines = new Map();
    const update = (run) => {
      const { done, texts, ended } = totals(run.shards);
      element.hidden = !run.shards.length && !run.running;
      overall.hidden = !run.shards.length;
      about.textContent = run.shards.length
        ? `${count(done)} of ${count(texts)} texts in ${plural(run.shards.length, "shard")}, ${ended} ended.`
        : "The plan is not made yet; shards show here when it is.";
      overall.firstChild.style.setProperty("--share", texts ? done / texts : 0);
      for (const [key, value] of [
        ["aria-valuemax", texts],
        ["aria-valuenow", done],
      ])
        overall.setAttribute(key, value);
      for (const shard of run.shards) {
        const line = lines.get(shard.shard) ?? shardLine();
        lines.set(shard.shard, line);
        line.update(shard);
      }
      const shown = run.shards.map(({ shard }) => lines.get(shard).element);
      if (shown.length !== list.children.length) list.replaceChildren(...shown);
    };
    return { element, update };
  }

  function totals(shards) {
    const total = (name) => shards.reduce((sum, shard) => sum + (shard[name] ?? 0), 0);
    return {
      done: total("done"),
      texts: total("texts"),
      ended: shards.filter(({ state }) => ENDED.has(state)).length,
    };
  }

  function failures({ failures: found, summary: ended }, opened) {
    if (!found.length)
      return ended ? panel("Failures by kind", null, h("p.empty", null, "No text failed or was refused.")) : null;
    const item = ({ kind, count: number, row_ids: rows, more }) =>
      h(
        "details.failure",
        { open: opened.has(kind), "data-kind": kind },
        h("summary", null, h("code", null, kind), h("span.number", null, plural(number, "text"))),
        h(
          "ul.rows",
          { "aria-label": `Rows with ${kind}` },
          rows.map((row) => h("li", null, h("code", null, row))),
        ),
        more ? h("p.about", null, `and ${count(more)} more; the shards' files hold them all.`) : null,
      );
    return panel("Failures by kind", "With the ids of the rows that have such a text.", found.map(item));
  }

  /** A place whose content is made again only when what it shows is another. */
  function part(make, pick) {
    const element = h("div.part");
    let before;
    const update = (run) => {
      const now = JSON.stringify(pick(run));
      if (now === before) return;
      before = now;
      const opened = new Set([...element.querySelectorAll("details[open]")].map(({ dataset }) => dataset.kind));
      const content = make(run, opened);
      element.replaceChildren(...(content ? [content] : []));
    };
    return { element, update };
  }

  /** What a listener hears while the run goes on. */
  function news({ running, state, shards }) {
    if (!running) return `The run has ended: ${state}.`;
    if (state === "queued") return "Queued.";
    if (!shards.length) return "Running: not planned yet.";
    const { done, texts, ended } = totals(shards);
    const tenth = texts ? Math.floor(done / texts / STEP_OF_NEWS) : 0;
    return `Running: ${tenth * 10}\u00a0% of the texts done, ${ended} of ${plural(shards.length, "shard")} ended.`;
  }

  /** Return the page's content, and a function that brings it up to date. */
  function page() {
    const shards = shardsPanel();
    const parts = [
      part(head, (run) => [run.run_id, run.state, run.day, run.dry_run]),
      part(notes, (run) => [run.problem, run.reason, run.state]),
      part(summary, (run) => run.summary),
      shards,
      part(failures, (run) => [run.failures, run.summary !== null]),
      part(plan, (run) => run.plan),
    ];
    const live = h("p.live", { role: "status", "aria-live": "polite" });
    const updated = h("p.updated");
    const [first, second, ...rest] = parts.map(({ element }) => element);
    const update = (run) => {
      for (const each of parts) each.update(run);
      const told = news(run);
      if (live.textContent !== told) live.textContent = told;
      live.dataset.state = run.running ? "running" : "ended";
      updated.textContent = run.running
        ? `Updated ${new Date().toLocaleTimeString("en-GB")}, again every 5 seconds.`
        : "";
    };
    return { content: [first, second, h("div.going", null, live, updated), ...rest], update };
  }

  tagging.run = { page };
})(globalThis.tagging);
