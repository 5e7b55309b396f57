/** The page of one dataset: its state, a chosen range of days in figures and charts, its last runs. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, pill, prose, note, tile, table, panel, shortened, home, airflowLink } = tagging.dom;
  const { count, usd, percent, duration, plural, atLeast, short, dayOf } = tagging.format;
  const { within, sum, knownSum } = tagging.days;
  const { hrefOf, budget, moment, passed, isBlank, lastRun } = tagging.overview;

  const DEFAULT_DAYS = 90;
  const PRESETS = [
    ["7 days", 7],
    ["28 days", 28],
    ["90 days", 90],
    ["1 year", 365],
  ];
  const RUNS_SHOWN = 14;

  const day = (value) => tagging.days.parse(value);
  const rangeHref = (dagId, from, to) => `${hrefOf(dagId)}?from=${tagging.days.text(from)}&to=${tagging.days.text(to)}`;

  /** The facts that do not depend on the range. */
  function head({ card, days }, context) {
    const when = (at) => {
      const told = passed(at, context);
      return at && h("span", null, told && `${told}, `, moment(at, card.timezone));
    };
    const facts = [
      ["DAG", airflowLink(`dags/${encodeURIComponent(card.dag_id)}`, card.dag_id)],
      ["Model", days.findLast((each) => each.model)?.model],
      [lastRun(card), when(card.last_run_at)],
      ["Next run", when(card.next_run_at)],
      ["This month", !isBlank(card) && `${usd(card.spent_month_usd)} spent, ${usd(card.saved_month_usd)} saved`],
    ];
    const line = facts
      .filter(([, value]) => value)
      .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value)));
    const name = h("div.name", null, h("h1", { tabindex: -1 }, card.dataset), pill(card.state));
    return h("div.title", null, name, h("dl.line", null, line), budget(card));
  }

  function notes({ card }) {
    const failed = card.state === "failed" && card.reason && card.reason !== card.problem;
    return [
      card.problem && note("warn", "Not everything can be shown", card.problem),
      failed && note("bad", "The last run failed", card.reason),
    ];
  }

  /** Presets and two inputs to choose days by. `state` is what is shown now. */
  function rangeBar(page, { from, to, today, error }) {
    const { dag_id: dagId } = page.card;
    const first = day(page.first_day) ?? from;
    const starts = [...PRESETS.map(([name, length]) => [name, today - length + 1]), ["All", Math.min(first, today)]];
    const current = to === today ? starts.find(([, start]) => start === from)?.[0] : null;
    const presets = starts.map(([name, start]) =>
      h(
        "a",
        { href: rangeHref(dagId, start, today), "data-key": name, "aria-current": name === current ? "true" : null },
        name,
      ),
    );
    const message = h("p.invalid", { id: "range-error", role: "alert" }, error);
    const input = (name, value) =>
      h("input", {
        type: "date",
        value: tagging.days.text(value),
        "data-key": name,
        name,
        min: "2000-01-01",
        max: "2099-12-31",
        "aria-describedby": "range-error",
        onkeydown: (event) => {
          if (event.key === "Enter") apply();
        },
      });
    const [start, end] = [input("from", from), input("to", to)];
    const apply = () => {
      const chosen = tagging.days.range(start.value, end.value);
      message.textContent = chosen.error ?? "";
      for (const each of [start, end]) each.setAttribute("aria-invalid", String(Boolean(chosen.error)));
      if (!chosen.error) location.hash = rangeHref(dagId, chosen.from, chosen.to);
    };
    return h(
      "section.range",
      { "aria-label": "Range of days" },
      h("nav.presets", { "aria-label": "Ranges" }, presets),
      h(
        "div.dates",
        null,
        h("label", null, "From", start),
        h("label", null, "to", end),
        h("button", { type: "button", "data-key": "show", onclick: apply }, "Show"),
      ),
      message,
    );
  }

  /** The days that are shown, in words. */
  function said(page, asked, { from, to }, unit) {
    const by = { day: "", week: " Charts are by week.", month: " Charts are by month." }[unit];
    const begins = asked.from < from ? ` The history begins on ${page.first_day}.` : "";
    const [start, end] = [from, to].map(tagging.days.text);
    return h("p.said", null, `${start} to ${end}: ${plural(to - from + 1, "day")} of ${page.card.timezone}.${begins}${by}`);
  }

  function tiles(days) {
    const spent = knownSum(days, "spent_usd");
    const saved = knownSum(days, ...tagging.figures.SAVED);
    const [runs, texts, cached, tagged, refused, failed] = [
      "runs",
      "texts",
      "cached",
      "tagged",
      "refused",
      "failed",
    ].map((name) => sum(days, name));
    const [tokens, cachedTokens, output] = ["input_tokens", "cached_input_tokens", "output_tokens"].map((name) =>
      sum(days, name),
    );
    const left = ["skipped", "pending"].map((name) => [name, days.at(-1)[name]]).filter(([, number]) => number);
    const asked = tagged + refused + failed;
    const each =
      spent.value !== null && !spent.unknown && asked
        ? `${usd((spent.value / asked) * 1000)} per 1,000 new texts`
        : null;
    const whole =
      spent.value !== null && saved.value !== null && !spent.unknown && !saved.unknown && spent.value + saved.value;
    const unknown = ({ unknown: number }) => (number ? `unknown on ${plural(number, "day")}` : null);
    const also = left.map(([name, number]) => `${count(number)} still ${name}`).join(", ");
    return h(
      "dl.tiles",
      null,
      tile("Spent", atLeast(spent, usd), unknown(spent) ?? each, "spent"),
      tile(
        "Saved",
        atLeast(saved, usd),
        unknown(saved) ?? (whole ? `${percent(saved.value / whole)} of what it would have cost` : null),
        "saved",
      ),
      tile("Texts", count(texts), plural(runs, "run"), "texts"),
      tile("Cached", texts ? percent(cached / texts) : "none", `${count(cached)} texts`, "cached"),
      tile(
        "Newly tagged",
        count(tagged),
        [refused ? `${count(refused)} refused` : "", also].filter(Boolean).join(", ") || "none refused",
        "tagged",
      ),
      tile(
        "Failed",
        count(failed),
        asked ? `${percent(failed / asked)} of those asked` : "nothing was asked",
        "failed",
      ),
      tile(
        "Tokens in",
        short(tokens),
        `${tokens ? percent(cachedTokens / tokens) : "none"} cached, ${short(output)} out`,
        "tokens",
      ),
    );
  }

  const COLUMNS = [
    "Run",
    "State",
    "Texts",
    "Cached",
    "Tagged",
    "Refused",
    "Failed",
    "Skipped",
    "Pending",
    "Spent",
    "Estimated",
    "Tagging took",
  ];
  const NUMBERS = ["texts", "cached", "tagged", "refused", "failed", "skipped", "pending"];

  function runRow(dagId, embedded) {
    const money = (value) => ({ text: usd(value), value });
    return (run) => {
      const path = `${encodeURIComponent(dagId)}/${encodeURIComponent(run.run_id)}`;
      const name = embedded
        ? h("span", null, run.run_id)
        : h("a", { href: new URL(`run/${path}`, home()).href }, run.run_id);
      const inAirflow = embedded
        ? null
        : airflowLink(`dags/${encodeURIComponent(dagId)}/runs/${encodeURIComponent(run.run_id)}`, "Airflow");
      return [
        h(
          "div.run",
          null,
          name,
          h("span.about", null, run.day, run.dry_run && " · dry run", inAirflow && " · ", inAirflow),
        ),
        h(
          "div",
          null,
          pill(run.state),
          run.state === "failed" && run.reason && h("p.why", { title: run.reason }, prose(run.reason)),
        ),
        ...NUMBERS.map((key) => ({ text: count(run[key]), value: run[key] })),
        money(run.spent_usd),
        money(run.estimated_usd),
        { text: duration(run.seconds), value: run.seconds },
      ];
    };
  }

  function runs(page, { from, to }, embedded) {
    const columns = COLUMNS.map((name, index) => ({ name, number: index > 1 }));
    const found = within(page.runs, from, to);
    const row = runRow(page.card.dag_id, embedded);
    const content = found.length
      ? shortened(found, RUNS_SHOWN, (some) => table("Last runs", columns, some.map(row), "runs"), "runs")
      : h(
          "p.empty",
          null,
          embedded ? "None of the runs that this file lists ended in these days." : "No run ended in these days.",
        );
    const element = panel(
      "Last runs",
      found.length >= 50 ? "The latest 50 of these days, newest first." : "Newest first.",
      content,
    );
    element.classList.add("wide");
    element.dataset.panel = "runs";
    return element;
  }

  /** What stands in place of figures where there are none. */
  function nothing({ card, runs, first_day: first, last_day: last }, { from, to }) {
    const dag = airflowLink(`dags/${encodeURIComponent(card.dag_id)}`, card.dag_id);
    const blank = (title, ...words) => h("div.blank", null, h("h2", null, title), h("p", null, ...words));
    if (!last && card.problem) return blank("No figures", "They show here when what is said above is solved.");
    if (!last && runs.length)
      return blank("No figures yet", "They come with the first run that is reported and is no dry run.");
    if (!last) return blank("Not run yet", "The figures come with the first run that ends. Trigger ", dag, ".");
    const latest = day(last);
    const [start, end] = [from, to].map(tagging.days.text);
    const told = `Nothing ran from ${start} to ${end} (${card.timezone}); the history goes from ${first} to ${last}. `;
    const href = rangeHref(card.dag_id, Math.max(day(first), latest - 27), latest);
    return blank("No run in these days", told, h("a", { href }, "Show its last four weeks"));
  }

  /** The days that are shown: those asked for, but none before the history begins or after today. */
  function clamp({ from, to }, page, today) {
    const first = day(page.first_day) ?? from;
    const latest = Math.max(today, day(page.last_day) ?? today);
    const [start, end] = [Math.max(from, first), Math.min(to, latest)];
    return start > end ? { from, to } : { from: start, to: end };
  }

  /** Return the first day to load for a range: what moved is told by the five weeks before its end. */
  const needed = ({ from, to }) =>
    Math.max(Math.min(from, to - tagging.days.RECENT - tagging.days.BEFORE + 1), tagging.days.parse("2000-01-01"));

  /**
   * Return the page's content and the charts that are to be drawn when it stands in the page.
   * @param {object} page the data
   * @param {{from: number, to: number}|null} asked null for the last 90 days
   * @param {{now: number, embedded: boolean, error?: string}} context
   */
  function render(page, asked, { now, embedded, error }) {
    const today = day(dayOf(new Date(now), page.card.timezone));
    const range = asked ?? { from: today - DEFAULT_DAYS + 1, to: today };
    const shown = clamp(range, page, today);
    const days = within(page.days, shown.from, shown.to);
    const top = [head(page, { now, embedded }), ...notes(page), rangeBar(page, { ...range, today, error })];
    if (!days.length) {
      const ended = within(page.runs, range.from, range.to).length;
      const listed = ended ? h("div.panels", null, runs(page, range, embedded)) : null;
      return { content: [...top, nothing(page, range), listed], charts: [] };
    }
    const { elements, charts, unit } = tagging.figures.panels(page, shown);
    const content = [
      ...top,
      said(page, range, shown, unit),
      tiles(days),
      h("div.panels", null, elements, runs(page, range, embedded)),
    ];
    return { content, charts };
  }

  tagging.dataset = { render, needed };
})(globalThis.tagging);
