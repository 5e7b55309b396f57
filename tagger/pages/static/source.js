/** Where the page's data comes from: its server, or the file that it is. */
globalThis.tagging ??= {};

((tagging) => {
  "use strict";

  const { home } = tagging.dom;

  const PATIENCE = 30_000;
  const MOST_DAYS = 1_200; // that the server gives at once, as are the runs
  const MOST_RUNS = 50;

  /** Why there is nothing to show, for the reader. */
  class Problem extends Error {
    /** @param {boolean} isFinal whether it is of no use to ask again */
    constructor(title, text, isFinal = false) {
      super(text);
      this.title = title;
      this.isFinal = isFinal;
    }
  }

  function problemOf(status, detail, what) {
    if (status === 401) return new Problem("You are not logged in", "Log in to Airflow and load this page again.", true);
    if (status === 403)
      return new Problem(
        `You may not see ${what}`,
        "It needs read access to the DAG; ask an administrator of Airflow.",
        true,
      );
    if (status === 404) return new Problem(`There is no ${what}`, detail ?? "It may have been removed or renamed.", true);
    return new Problem(
      `Cannot show ${what}`,
      detail ?? `Airflow answered with status ${status} and no figures. Its log may say why.`,
    );
  }

  /** Get JSON from this page's server. */
  async function get(path, what, signal) {
    let answer;
    try {
      const signals = [AbortSignal.timeout(PATIENCE), ...(signal ? [signal] : [])];
      answer = await fetch(new URL(path, home()), {
        headers: { Accept: "application/json" },
        signal: AbortSignal.any(signals),
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      const why =
        error.name === "TimeoutError"
          ? "It did not answer within 30 seconds."
          : "Is the network down, or Airflow stopped?";
      throw new Problem("Airflow cannot be reached", why);
    }
    const body = await answer.json().catch(() => null);
    if (answer.ok && body) return body;
    const told = typeof body?.detail === "string" && body.detail !== answer.statusText;
    throw problemOf(answer.status, told ? body.detail : null, what);
  }

  /** Get a dataset's page for a range, from its end backwards in as many parts as the server wants. */
  async function wholeRange(dagId, range, signal) {
    const { text, parse } = tagging.days;
    const ask = (query) => get(`api/v1/datasets/${encodeURIComponent(dagId)}${query}`, `DAG ${dagId}`, signal);
    if (!range) return ask("");
    const tomorrow = parse(new Date(Date.now() + 86_400_000).toISOString().slice(0, 10)); // the day of all zones or later
    let end = Math.min(range.to, tomorrow);
    const start = Math.min(tagging.dataset.needed(range), end);
    const parts = [];
    do {
      const first = Math.max(start, end - MOST_DAYS + 1);
      parts.unshift(await ask(`?start=${text(first)}&end=${text(end)}`));
      end = first - 1;
    } while (end >= start && parts[0].first_day && text(end) >= parts[0].first_day);
    const runs = parts.toReversed().flatMap((part) => part.runs);
    return { ...parts[0], days: parts.flatMap((part) => part.days), runs: runs.slice(0, MOST_RUNS) };
  }

  /** The data of this page's server. */
  const served = {
    embedded: false,
    now: () => Date.now(),
    cards: async (signal) => (await get("api/v1/datasets", "the overview", signal)).datasets,
    dataset: wholeRange,
    run: (dagId, runId, signal) =>
      get(`api/v1/datasets/${encodeURIComponent(dagId)}/runs/${encodeURIComponent(runId)}`, `run ${runId}`, signal),
  };

  /** The data that a self-contained file holds. */
  function contained({ generated_at: generated, datasets }) {
    return {
      embedded: true,
      generated,
      only: datasets.length === 1 ? datasets[0].card.dag_id : null,
      now: () => new Date(generated).getTime(),
      cards: async () => datasets.map(({ card }) => card),
      async dataset(dagId) {
        const page = datasets.find(({ card }) => card.dag_id === dagId);
        if (!page) throw new Problem(`There is no DAG ${dagId}`, "This file does not hold it.");
        return page;
      },
    };
  }

  /** Return the page's source of data. */
  function open() {
    const data = document.getElementById("data");
    return data ? contained(JSON.parse(data.textContent)) : served;
  }

  tagging.source = { open, Problem };
})(globalThis.tagging);
