/** The overview: a card for each dataset. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { h, pill, note, prose, bar } = tagging.dom;
  const { count, usd, percent, time, ago, known, UNKNOWN } = tagging.format;

  const NEARLY = 0.2; // of the month's budget

  const hrefOf = (dagId) => `#/d/${encodeURIComponent(dagId)}`;

  /** What is left of the month's budget, as a bar and in words; null without a limit. */
  function budget({ budget_month_usd: limit, budget_left_usd: left }) {
    if (!known(limit)) return null;
    if (!known(left)) return h("p.budget", null, `Budget of ${usd(limit)} a month; what is left is ${UNKNOWN}`);
    const share = limit > 0 ? Math.max(0, left) / limit : 0;
    const [kind, word] = left <= 0 ? ["bad", "used up"] : share < NEARLY ? ["warn", "nearly used up"] : ["", ""];
    const told = `${usd(Math.max(0, left))} of ${usd(limit)} left this month`;
    return h(
      "div.budget",
      null,
      h("p", null, h("span", null, told), word && h("strong", { class: kind }, word)),
      h(
        "div",
        {
          role: "meter",
          "aria-label": "Budget left",
          "aria-valuemin": 0,
          "aria-valuemax": limit,
          "aria-valuenow": Math.max(0, Math.min(left, limit)),
          "aria-valuetext": told,
        },
        bar(share, kind),
      ),
    );
  }

  /** "3 h ago"; nothing in a file, which is read at any time after. */
  const passed = (iso, { now, embedded }) => (iso && !embedded ? ago(iso, now) : null);

  /** "2026-11-23 10:04 Asia/Tokyo" */
  const moment = (iso, zone) => (iso ? h("time", { datetime: iso }, time(iso, zone)) : null);

  function fact(name, value, about, key) {
    const unknown = [UNKNOWN, "none yet", "none planned"].includes(value);
    const figure = h("dd", { class: unknown ? "unknown" : null }, value, about && h("span.about", null, about));
    return h("div", { "data-figure": key }, h("dt", null, name), figure);
  }

  /** Whether there is nothing to tell of a dataset, though nothing keeps it from being told. */
  const isBlank = ({ problem, texts, spent_month_usd: spent }) => !problem && texts === null && !spent;

  /** What the time of the last run is: it may not have ended. */
  const lastRun = ({ state }) => ({ queued: "Queued", running: "Started" })[state] ?? "Last run";

  function facts(each, context) {
    const share = known(each.cached_share) ? `${percent(each.cached_share)} cached` : null;
    const figure = (value, format) => (isBlank(each) ? "none yet" : format(value));
    return h(
      "dl.facts",
      null,
      fact("Texts, last run", figure(each.texts, count), share, "texts"),
      next(each, context),
      fact("Spent this month", figure(each.spent_month_usd, usd), null, "spent"),
      fact("Saved this month", figure(each.saved_month_usd, usd), null, "saved"),
    );
  }

  /** The next run; a file does not know it, and has nothing to say of it. */
  function next({ next_run_at: at, timezone }, context) {
    if (!at) return context.embedded ? null : fact("Next run", "none planned", null, "next");
    const told = passed(at, context);
    return fact("Next run", told ?? "", moment(at, timezone), "next");
  }

  function card(each, context) {
    const told = passed(each.last_run_at, context);
    const ran =
      each.last_run_at &&
      h("p.when", null, `${lastRun(each)} `, told && `${told}, `, moment(each.last_run_at, each.timezone));
    const failed = each.reason && each.state === "failed" && !each.problem;
    return h(
      "article.card",
      { "data-dataset": each.dataset, "data-state": each.state },
      h(
        "header",
        null,
        h("h2", null, h("a", { href: hrefOf(each.dag_id), title: each.dataset }, each.dataset)),
        pill(each.state),
      ),
      ran,
      each.problem && note("warn", null, each.problem),
      failed && h("p.reason", { title: each.reason }, prose(each.reason)),
      facts(each, context),
      budget(each),
    );
  }

  /** "3 datasets: $1.20 spent and $30.00 saved this month." */
  function total(all) {
    const cards = all.filter((each) => !isBlank(each));
    const datasets = tagging.format.plural(all.length, "dataset");
    if (!cards.length) return `${datasets}.`;
    const sum = (name) => {
      const values = cards.map((each) => each[name]).filter(known);
      const told = usd(values.reduce((a, b) => a + b, 0));
      return values.length === cards.length ? told : values.length ? `at least ${told}` : UNKNOWN;
    };
    return `${datasets}: ${sum("spent_month_usd")} spent and ${sum("saved_month_usd")} saved this month.`;
  }

  /** Datasets in trouble come first, then by name. */
  function ordered(cards) {
    const rank = ({ problem, state }) => (problem ? 0 : state === "failed" ? 1 : 2);
    return [...cards].sort((a, b) => rank(a) - rank(b) || a.dataset.localeCompare(b.dataset));
  }

  function empty() {
    return h(
      "div.blank",
      null,
      h("h2", null, "No dataset yet"),
      h(
        "p",
        null,
        "A dataset is a file ",
        h("code", null, "dags/datasets/NAME.yaml"),
        ", and Airflow makes the DAG ",
        h("code", null, "tag_NAME"),
        " of it. It shows here when its DAG is loaded.",
      ),
      h(
        "p",
        null,
        "If there should be one: see whether you may read its DAG, and whether Airflow reports an import error.",
      ),
    );
  }

  /**
   * Return the overview's content.
   * @param {object[]} cards
   * @param {{now: number, embedded: boolean}} context
   */
  function render(cards, context) {
    const about = cards.length ? total(cards) : null;
    return [
      h("div.title", null, h("h1", { tabindex: -1 }, "Tagging"), about && h("p.about", null, about)),
      cards.length
        ? h(
            "div.cards",
            null,
            ordered(cards).map((each) => card(each, context)),
          )
        : empty(),
    ];
  }

  tagging.overview = { render, hrefOf, budget, moment, passed, isBlank, lastRun };
})(globalThis.tagging);
