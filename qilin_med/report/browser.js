// The browser of samples. What comes from data is set as text, never as markup.
"use strict";
const samples = {};

function make(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

async function read(part, number) {
  if (part.dataset.file && !(number in samples)) {
    await new Promise((resolve, reject) =>
      document.head.append(make("script", { src: part.dataset.file, onload: resolve, onerror: reject })));
  }
  const bytes = Uint8Array.from(atob(samples[number] ?? part.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function likelihoods(answer, gold) {
  const highest = Math.max(...answer.options.map(([, value]) => value));
  const weights = answer.options.map(([, value]) => Math.exp(value - highest));
  const sum = weights.reduce((a, b) => a + b, 0);
  const rows = answer.options.map(([text, value], n) => make("tr", {},
    make("td", { className: "option" }, text.trim()),
    make("td", { className: "number" }, value.toFixed(2)),
    make("td", { className: "number" }, (100 * weights[n] / sum).toFixed(1) + "%"),
    make("td", {}, make("meter", { value: weights[n] / sum, title: "share of the likelihood" }))));
  const head = make("tr", {}, ...["option", "log-likelihood", "share", ""].map((name) => make("th", {}, name)));
  return make("div", { className: "scroll" }, make("table", {}, head, ...rows));
}

function shown(question, models) {
  const marks = question.answers.map((answer, n) => answer && make("span",
    { className: "mark " + (answer.right === null ? "" : answer.right ? "right" : "wrong") },
    `${models[n]} ${answer.right === null ? answer.mark : answer.right ? "✓" : "✗"}`)).filter(Boolean);
  const title = make("summary", {}, question.question.split("\n")[0], make("span", { className: "marks" }, ...marks));
  const fold = make("details", { className: "sample" }, title);
  fold.addEventListener("toggle", () => {
    if (fold.childElementCount > 1) return;
    fold.append(make("p", { className: "text" }, question.question));
    fold.append(make("p", { className: "text" }, make("b", {}, "Reference: "), question.gold || "unknown"));
    const facets = Object.entries(question.facets).map(([name, value]) => `${name}: ${value}`);
    fold.append(make("p", { className: "small" }, [question.id, ...facets].join(" · ")));
    question.answers.forEach((answer, n) => {
      if (!answer) return;
      fold.append(make("h4", {}, `${models[n]} ${answer.mark}`), make("p", { className: "text" }, answer.text));
      if (answer.sources.length) fold.append(make("p", { className: "small" }, "passages: " + answer.sources.join(", ")));
      if (answer.options.length) fold.append(likelihoods(answer, question.gold));
      const prompt = make("pre", {}, question.prompts[answer.prompt]);
      fold.append(make("details", {}, make("summary", {}, "prompt"), prompt));
    });
  }, { once: true });
  return fold;
}

function browse(parts, place) {
  const step = 25;
  const pick = (label) => {
    const select = make("select", { ariaLabel: label });
    place.append(make("label", {}, label, select));
    return select;
  };
  const fill = (select, groups) => {
    const chosen = select.value;
    const options = (entries) => entries.map(([value, text]) => make("option", { value }, text));
    select.replaceChildren(...groups.flatMap(([name, entries]) =>
      name ? [make("optgroup", { label: name }, ...options(entries))] : options(entries)));
    if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
  };
  place.className = "browser";
  const [set, model, verdict, change, facet] = ["set", "model", "answer", "against another model", "facet"].map(pick);
  const words = make("input", { type: "search" });
  const count = make("p", { className: "small", role: "status" });
  const list = make("div", {});
  const more = make("button", { type: "button" }, "show more");
  place.append(make("label", {}, "text", words), count, list, more);
  let data, found, until;

  function show() {
    list.append(...found.slice(until, until + step).map((question) => shown(question, data.models)));
    until += step;
    more.hidden = until >= found.length;
  }

  function filter() {
    const one = +model.value, [how, other] = change.value.split(" "), [name, ...value] = JSON.parse(facet.value || "[]");
    found = data.questions.filter((question) => {
      const mine = question.answers[one], theirs = question.answers[other];
      if (!mine || (how && !theirs)) return false;
      if (verdict.value === "right" && mine.right !== 1) return false;
      if (verdict.value === "wrong" && mine.right !== 0) return false;
      if (verdict.value === "unread" && !mine.unread) return false;
      if (how === "gained" && !(mine.right === 1 && theirs.right === 0)) return false;
      if (how === "lost" && !(mine.right === 0 && theirs.right === 1)) return false;
      if (how === "differs" && mine.text === theirs.text) return false;
      if (name && question.facets[name] !== value[0]) return false;
      return !words.value || (question.question + mine.text).includes(words.value);
    });
    count.textContent = `${found.length.toLocaleString("en")} of ${data.questions.length.toLocaleString("en")} questions`;
    list.replaceChildren();
    until = 0;
    show();
  }

  function against() {
    const others = data.models.map((name, n) => [name, n]).filter(([, n]) => n !== +model.value);
    fill(change, [["", [["", "any"]]], ...others.map(([name, n]) => [name, [
      [`gained ${n}`, `right where ${name} is wrong`], [`lost ${n}`, `wrong where ${name} is right`],
      [`differs ${n}`, `another answer than ${name}'s`]]])]);
  }

  async function open() {
    count.textContent = "reading …";
    data = await read(parts[+set.value], +set.value);
    fill(model, [["", data.models.map((name, n) => [n, name])]]);
    model.value = data.models.length - 1;
    const facets = {};
    for (const question of data.questions) {
      for (const [name, value] of Object.entries(question.facets)) (facets[name] ??= new Set()).add(value);
    }
    const groups = Object.entries(facets).map(([name, values]) =>
      [name, [...values].sort().map((value) => [JSON.stringify([name, value]), value])]);
    fill(facet, [["", [["", "any"]]], ...groups]);
    against();
    filter();
  }

  fill(set, [["", parts.map((part, n) => [n, part.dataset.name])]]);
  fill(verdict, [["", [["", "any"], ["right", "right"], ["wrong", "wrong"], ["unread", "names no option"]]]]);
  set.onchange = open;
  model.onchange = () => { against(); filter(); };
  verdict.onchange = change.onchange = facet.onchange = words.oninput = filter;
  more.onclick = show;
  open();
}

const parts = [...document.querySelectorAll("script.samples")];
if (parts.length) browse(parts, document.getElementById("browser"));
