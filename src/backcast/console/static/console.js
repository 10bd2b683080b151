// All that pages need beside htmx: copying, the events of a run as lines, and rest while nobody looks.
(function () {
  "use strict";

  document.addEventListener("click", async function (event) {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const text = document.getElementById(button.dataset.copy).textContent.trim();
    try { await navigator.clipboard.writeText(text); } catch (_) { return select(button.dataset.copy); }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(function () { button.textContent = label; }, 1500);
  });

  function select(id) { // without the right to the clipboard: the person copies
    const range = document.createRange();
    range.selectNodeContents(document.getElementById(id));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  }

  document.addEventListener("keydown", function (event) {
    if (event.key !== "/" || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const first = document.querySelector("[data-filter]");
    if (first) { event.preventDefault(); first.focus(); }
  });

  // A refresh must not take away what a person is about to copy or has opened.
  document.addEventListener("htmx:beforeRequest", function (event) {
    const live = event.target.closest(".live");
    if (!live) return;
    const chosen = getSelection();
    const selects = !chosen.isCollapsed && live.contains(chosen.anchorNode);
    if (document.hidden || selects || live.querySelector("details[open]")) event.preventDefault();
  });

  const seen = new Set();

  function line(list, event) {
    if (seen.has(event.lastEventId)) return;
    seen.add(event.lastEventId);
    const item = document.createElement("li"), name = document.createElement("b"), about = document.createElement("span");
    let data = {};
    try { data = JSON.parse(event.data); } catch (_) { /* shown without its data */ }
    name.textContent = event.type;
    about.textContent = words(event.type, data);
    item.append(name, about);
    list.append(item);
    if (list.children.length > 500) list.firstElementChild.remove();
    list.scrollTop = list.scrollHeight;
  }

  function words(type, data) {
    if (type === "progress") return [data.fraction == null ? "" : Math.round(data.fraction * 100) + " %", data.message].join(" ").trim();
    if (type === "output") return (data.kind ? data.kind + " " : "") + JSON.stringify(data.data);
    if (type === "ended") return data.run ? data.run.state + (data.run.error ? ": " + data.run.error.detail : "") : "";
    if (type === "retrying") return "attempt " + data.attempt + (data.error ? ": " + data.error.detail : "");
    if (type === "started") return "attempt " + data.attempt;
    return data.at || "";
  }

  let answer = null; // of a cast, as far as it has come: shown until the run has ended

  function partial(event) {
    try {
      const data = JSON.parse(event.data).data;
      answer = typeof data === "string" ? data : JSON.stringify(data, null, 2);
    } catch (_) { /* the next one comes soon */ }
    showPartial();
  }

  function showPartial() {
    const place = document.querySelector("[data-partial]");
    if (place && answer !== null) place.textContent = answer;
  }

  document.addEventListener("htmx:afterSwap", showPartial);

  document.addEventListener("htmx:sseOpen", function (event) {
    const source = event.detail.source, list = document.querySelector("[data-events]");
    for (const name of ["queued", "started", "progress", "output", "dropped", "retrying", "ended"]) {
      if (list) source.addEventListener(name, function (each) { line(list, each); });
    }
    source.addEventListener("output", partial);
  });
})();
