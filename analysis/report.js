"use strict";
// Draws the page from the numbers in #routes; see `numbers` in page.py for what they are.
(() => {
  const data = JSON.parse(document.getElementById("routes").textContent);
  const { layers, texts, names, num_experts: numExperts } = data;
  const numTokens = texts.length;
  // gateOf[layer][token]: a Map from each expert that took the token to its gate.
  const gateOf = layers.map((layer) =>
    layer.chosen.map((experts, t) => new Map(experts.map((e, i) => [e, layer.gates[t][i]])))
  );
  const experts = [...Array(numExperts).keys()];
  // Neighbours far apart on the circle of hues, and every other one darker: eight are told apart at a glance.
  const hueOf = (e) => (numExperts <= 12 ? (e * 360) / numExperts : e * 137.508) % 360;
  const dimOf = (e) => (e % 2) * 9;
  const styleOf = (e) => `--hue:${hueOf(e).toFixed(1)};--dim:${dimOf(e)}`;
  const mostExperts = Math.max(1, ...layers.map((layer) => largest(layer.chosen.map((list) => list.length))));
  const largestGate = Math.max(...layers.map((layer) => largest(layer.gates.map(largest)))) || 1;
  // leading[layer][token]: the expert with the largest gate, null where none took the token.
  const leading = gateOf.map((tokens) => tokens.map((gates) =>
    [...gates].reduce((best, [e, gate]) => (best === null || gate > best[1] ? [e, gate] : best), null)?.[0] ?? null));
  // Where every token has as many experts as the next, their number says nothing, and colours tell experts apart.
  const sameNumber = layers.map((layer) => layer.chosen.every((list) => list.length === layer.chosen[0].length));
  // What is shown: an index into layers, an expert, a token and the one in the tab order; null is all, or none.
  const state = { layer: 0, expert: null, token: null, focus: 0 };

  function largest(values) {
    return values.reduce((most, value) => Math.max(most, value), 0); // spreading would overflow on long texts
  }
  const byId = (id) => document.getElementById(id);
  const show = (value, digits = 3) => String(Number(value.toPrecision(digits)));
  const count = (number, word) => `${show(number)} ${word}${number === 1 ? "" : "s"}`;
  const word = (t) => texts[t] || names[t];
  const shownLayers = () => (state.layer === null ? layers.map((_, i) => i) : [state.layer]);
  const shownExperts = () => (state.expert === null ? experts : [state.expert]);

  /** An HTML or SVG element; text is only ever set as text. */
  function make(tag, attributes = {}, ...children) {
    const isSvg = ["svg", "path", "line", "circle", "text", "rect"].includes(tag);
    const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.map((child) => (typeof child === "number" ? String(child) : child)));
    return element;
  }

  function setTable(id, head, rows) {
    const table = byId(id);
    table.tHead.replaceChildren(make("tr", {}, ...head.map((cell) =>
      cell instanceof Node ? cell : make("th", { scope: "col" }, cell))));
    table.tBodies[0].replaceChildren(...rows);
  }

  // The value of a token is the mean over the shown layers: of the number of experts that took it, or of one
  // expert's gate, which is 0 where it did not.
  function valueOf(t) {
    const values = shownLayers().map((i) => (state.expert === null ? gateOf[i][t].size : gateOf[i][t].get(state.expert) ?? 0));
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }

  function facts() {
    const entries = [
      ["Checkpoint", data.checkpoint],
      ["Model", data.model_type],
      ["Sparse layers", layers.length],
      ["Experts", `${numExperts}, ${show(data.capacity_factor)} per token`],
      ["Tokens", numTokens.toLocaleString("en")],
      ["Causal loss", data.loss === null ? "none" : `${show(data.loss, 4)} nats per token`],
    ];
    byId("facts").replaceChildren(...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
    document.title = `Expert choice: ${data.checkpoint}`;
    const option = (value, text) => make("option", { value }, text);
    byId("layer").replaceChildren(...layers.map((layer, i) => option(i, `Layer ${layer.layer}`)), option("", "All layers"));
    byId("expert").replaceChildren(option("", "All experts"), ...experts.map((e) => option(e, `Expert ${e}`)));
  }

  const tokens = texts.map((text, t) => {
    const element = make("span", { role: "option", tabindex: t ? -1 : 0, "aria-selected": false, "data-token": t }, word(t));
    if (!text) element.classList.add("special");
    if (text.includes("\n")) element.classList.add("break");
    return element;
  });

  function drawText() {
    const byExpert = state.layer !== null && state.expert === null && sameNumber[state.layer];
    const most = state.expert === null ? mostExperts : largestGate;
    const unit = state.expert === null ? "expert" : "gate";
    tokens.forEach((element, t) => {
      const value = valueOf(t);
      const uncovered = shownLayers().every((i) => gateOf[i][t].size === 0);
      const leader = byExpert ? leading[state.layer][t] : null;
      element.style.cssText = leader === null ? `--value:${value / most}` : styleOf(leader);
      element.classList.toggle("expert", leader !== null);
      element.dataset.value = value;
      element.dataset.short = leader === null ? show(value, 2) : leader;
      element.classList.toggle("uncovered", uncovered);
      const label = leader !== null ? `leading expert ${leader}` : unit === "expert" ? count(value, "expert") : `gate ${show(value)}`;
      element.setAttribute("aria-label", `${word(t)}: ${label}${uncovered && unit === "gate" ? ", no expert" : ""}`);
    });
    const mean = state.layer === null ? "mean over layers of the " : "";
    const what = unit === "expert" ? "number of experts that took the token" : `gate of expert ${state.expert}`;
    const same = state.expert === null && shownLayers().every((i) => sameNumber[i]);
    const shade = same ? "Every token has as many experts as the next in every layer: choose a layer, or an expert, to see them apart" :
      `Shade: ${mean}${what}`;
    byId("legend").replaceChildren(...(byExpert ? expertLegend(`Every token has ${count(layers[state.layer].chosen[0].length, "expert")} here. Colour: leading expert`) : [
      make("span", {}, shade),
      ...(same ? [] : [make("span", {}, "0", make("i", { class: "ramp" }), show(most))]),
      make("span", { class: "uncovered" }, "taken by no expert"),
    ]));
    byId("shown").value = `${numTokens.toLocaleString("en")} tokens, ` +
      `${tokens.filter((element) => element.classList.contains("uncovered")).length} taken by no expert`;
  }

  /** What the colours stand for; of many experts the first ones. */
  function expertLegend(title) {
    const shown = experts.slice(0, 16);
    return [make("span", {}, title), make("span", {}, ...shown.flatMap((e) =>
      [make("span", { class: "expert chip", style: styleOf(e) }, e), " "]), numExperts > shown.length ? "…" : "")];
  }

  /** All layers at once: a row of pixels for each, stretched by the style; a colour as CSS resolves it. */
  function drawOverview() {
    const canvas = byId("picture"), pen = canvas.getContext("2d");
    const row = Math.max(10, Math.min(24, Math.round(300 / layers.length)));
    canvas.width = numTokens;
    canvas.height = layers.length;
    byId("overview").style.setProperty("--row", `${row}px`);
    canvas.style.cssText = `width:max(100%, ${numTokens}px);height:${row * layers.length}px`;
    const probe = byId("overview-legend").appendChild(make("span", { class: "expert" }));
    const colours = experts.map((e) => {
      probe.style.cssText = styleOf(e);
      return getComputedStyle(probe).backgroundColor;
    });
    leading.forEach((tokens, i) => tokens.forEach((e, t) => {
      if (e === null) return;
      pen.fillStyle = colours[e];
      pen.fillRect(t, i, 1, 1);
    }));
    canvas.setAttribute("aria-label", `${layers.length} layers and ${numTokens} tokens, each coloured by its leading expert; the buttons beside it say which lead most`);
    byId("overview-legend").replaceChildren(...expertLegend("Expert"), make("span", {}, "no colour: taken by no expert"));
  }

  function layerButtons() {
    byId("layer-buttons").replaceChildren(...layers.map((layer, i) => {
      const share = experts.map((e) => leading[i].filter((leader) => leader === e).length / numTokens);
      const first = share.indexOf(Math.max(...share));
      return make("button", {
        type: "button", tabindex: i ? -1 : 0, "data-row": i, "aria-pressed": i === state.layer,
        "aria-label": `Layer ${layer.layer}: expert ${first} leads ${Math.round(100 * share[first])} % of the tokens, load ${show(largest(layer.load))} at most`,
      }, layer.layer);
    }));
  }

  /** The layer and token below the pointer. */
  function pointed(event) {
    const { left, top, width, height } = byId("picture").getBoundingClientRect();
    const within = (value, most) => Math.min(Math.max(Math.floor(value * most), 0), most - 1);
    return [within((event.clientY - top) / height, layers.length), within((event.clientX - left) / width, numTokens)];
  }

  function chooseLayer(i) {
    byId("layer").value = i;
    draw();
  }

  function gatesInWords(i, t) {
    const taken = [...gateOf[i][t]].map(([e, gate]) => `expert ${e} with gate ${show(gate)}`);
    return `layer ${layers[i].layer}: ${taken.join(", ") || "no expert"}`;
  }

  function showToken(t) {
    if (state.token !== null) {
      tokens[state.token].setAttribute("aria-selected", "false");
      byId("map").tBodies[0].rows[state.token]?.removeAttribute("aria-current");
    }
    state.token = t;
    tokens[t].setAttribute("aria-selected", "true");
    byId("map").tBodies[0].rows[t]?.setAttribute("aria-current", "true");
    byId("token").textContent =
      `Token ${t + 1} of ${numTokens}, “${word(t)}”, ${shownLayers().map((i) => gatesInWords(i, t)).join("; ")}.`;
    setTable("gates", ["", ...experts], layers.map((layer, i) =>
      make("tr", {}, make("th", { scope: "row", class: i === state.layer ? "shown" : null }, `Layer ${layer.layer}`),
        ...experts.map((e) => {
          const gate = gateOf[i][t].get(e);
          return make("td", { "data-gate": gate, title: scoreTitle(i, t, e) }, gate === undefined ? "·" : gate.toPrecision(2));
        }))));
  }

  function scoreTitle(i, t, e) {
    const threshold = layers[i].threshold ? `, threshold ${show(layers[i].threshold[e])}` : "";
    const gate = gateOf[i][t].get(e);
    return `score ${show(layers[i].scores[t][e])}${threshold}, ${gate === undefined ? "not taken" : `gate ${show(gate)}`}`;
  }

  function focusToken(t, keepScroll) {
    tokens[state.focus].tabIndex = -1;
    state.focus = t;
    tokens[t].tabIndex = 0;
    tokens[t].focus({ preventScroll: keepScroll });
    const box = byId("map-box"), row = byId("map").tBodies[0].rows[t];
    box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }

  /** The token in the next or last line that lies nearest. */
  function lineAway(t, step) {
    const here = tokens[t].getClientRects()[0];
    let line = null, best = t, distance = Infinity;
    for (let i = t + step; i >= 0 && i < numTokens; i += step) {
      const there = tokens[i].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < here.height / 2) continue;
      line ??= there.top;
      if (Math.abs(there.top - line) > here.height / 2) break;
      if (Math.abs(there.left - here.left) < distance) [best, distance] = [i, Math.abs(there.left - here.left)];
    }
    return best;
  }

  function onKey(event) {
    const t = Number(event.target.dataset.token);
    const moves = {
      ArrowRight: () => t + 1, ArrowLeft: () => t - 1, Home: () => 0, End: () => numTokens - 1,
      ArrowDown: () => lineAway(t, 1), ArrowUp: () => lineAway(t, -1),
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    focusToken(Math.min(Math.max(moves[event.key](), 0), numTokens - 1), false);
  }

  // One layer: tokens and experts, the scores. All layers: tokens and layers, the numbers of experts or the scores of one.
  function drawMap() {
    const single = state.layer !== null;
    const counts = !single && state.expert === null;
    const columns = single ? experts.map((e) => [state.layer, e]) : layers.map((_, i) => [i, state.expert]);
    const title = ([i, e]) => (single ? `Expert ${e}` : `Layer ${layers[i].layer}`);
    const cell = (t, [i, e]) => {
      if (counts) {
        const number = gateOf[i][t].size;
        return make("td", { style: `--value:${number / mostExperts}`, "data-value": number }, number);
      }
      const score = layers[i].scores[t][e], { low, high } = layers[i].histogram;
      const attributes = { style: `--value:${(score - low) / (high - low)}`, "data-value": score, title: scoreTitle(i, t, e) };
      if (!gateOf[i][t].has(e)) return make("td", attributes, score.toPrecision(2));
      return make("td", { ...attributes, class: "taken" }, score.toPrecision(2), make("span", { class: "hidden" }, " taken"));
    };
    setTable("map",
      [make("th", { scope: "col", class: "words" }, "Token"), ...columns.map((column) => make("th", { scope: "col", class: single && column[1] === state.expert ? "shown" : null }, title(column)))],
      texts.map((_, t) => make("tr", {}, make("th", { scope: "row" }, word(t).replace(/\n/g, "↵")), ...columns.map((column) => cell(t, column)))));
    const note = counts ? "Number of experts that took each token, layer by layer." :
      `Scores of ${single ? `layer ${layers[state.layer].layer}` : `expert ${state.expert} in every layer`}; bold with a bar: the expert took the token.`;
    byId("map-note").textContent = note;
    byId("map").caption.textContent = note;
    if (state.token !== null) byId("map").tBodies[0].rows[state.token].setAttribute("aria-current", "true");
  }

  function histogram(i, e) {
    const { low, high, counts } = layers[i].histogram, threshold = layers[i].threshold?.[e];
    const most = Math.max(1, ...counts[e]), width = 240 / counts[e].length;
    const taken = layers[i].chosen.filter((list) => list.includes(e)).length;
    const bars = counts[e].map((number, b) => {
      const height = (90 * number) / most;
      return number ? `M${b * width} ${100 - height}h${width - 1}v${height}h${1 - width}z` : "";
    });
    const limit = threshold === undefined ? "" : `threshold ${show(threshold)}`;
    const label = `Layer ${layers[i].layer}, expert ${e}: scores from ${show(low)} to ${show(high)}, ${limit && `${limit}, `}${taken} of ${numTokens} tokens taken`;
    const svg = make("svg", {
      viewBox: "0 0 240 116", role: "img", "aria-label": label, "data-layer": layers[i].layer, "data-expert": e,
      "data-counts": counts[e].join(" "), "data-threshold": threshold,
    }, make("path", { class: "bars", d: bars.join("") }), make("path", { class: "axis", d: "M0 100.5h240" }),
    make("text", { x: 0, y: 112 }, show(low)), make("text", { x: 240, y: 112, "text-anchor": "end" }, show(high)));
    if (threshold !== undefined) {
      const at = (240 * (threshold - low)) / (high - low);
      svg.append(make("line", { class: "threshold", x1: at, x2: at, y1: 0, y2: 100 }));
    }
    return make("figure", {}, make("figcaption", {}, `Expert ${e} took ${taken} `, make("small", {}, limit)), svg);
  }

  function boundsInWords() {
    const { min_experts_per_token: least, max_experts_per_token: most, num_expert_groups: groups } = data;
    const each = groups > 1 ? `, as many of each of ${groups} groups (experts whose numbers are the same modulo ${groups})` : "";
    const bounds = [least ? `at least ${count(least, "expert")}` : "", most === null ? "" : `at most ${count(most, "expert")}`];
    return bounds.some(Boolean) ? `; a token has ${bounds.filter(Boolean).join(" and ")}${each}, those nearest their thresholds first` : "";
  }

  function drawHistograms() {
    byId("histograms").replaceChildren(...shownLayers().flatMap((i) =>
      [make("h3", {}, `Layer ${layers[i].layer}`), ...shownExperts().map((e) => histogram(i, e))]));
    byId("histograms-note").textContent = layers[0].threshold ?
      `How often each score occurs. An expert takes a token when its score lies above the dashed threshold${boundsInWords()}.` :
      "How often each score occurs. In this model the tokens choose their experts, so there is no threshold.";
  }

  /** A frame with a vertical axis from 0 to `most`, one place for each layer, and what `marks` puts there. */
  function chart(label, most, line, marks) {
    const place = 440 / layers.length, y = (value) => 140 - (125 * value) / most;
    const step = Math.ceil(layers.length / 20);
    const names = layers.flatMap((layer, i) => i % step ? [] :
      [make("text", { x: 35 + place * (i + 0.5), y: 155, "text-anchor": "middle" }, layer.layer)]);
    return make("figure", {}, make("figcaption", {}, label),
      make("svg", { viewBox: "0 0 480 160", role: "img", "aria-label": `${label}, by layer; the table below has the numbers` },
        make("path", { class: "axis", d: `M35 140.5h440M35 ${y(line)}h440` }),
        make("text", { x: 30, y: 144, "text-anchor": "end" }, 0),
        make("text", { x: 30, y: y(line) + 4, "text-anchor": "end" }, show(line)), ...names,
        ...layers.flatMap((layer, i) => marks(layer, 35 + place * (i + 0.5), y, Math.min(place * 0.6, 40)))));
  }

  function drawLoad() {
    const most = Math.max(1.25, ...layers.map((layer) => largest(layer.load)));
    byId("charts").replaceChildren(
      chart("Load of each expert", most, 1, (layer, x, y) => layer.load.map((load, e) =>
        make("circle", { class: e === state.expert ? "dot shown" : "dot", cx: x, cy: y(load), r: 4, "data-load": load }))),
      chart("Coverage", 1, 1, (layer, x, y, width) => {
        const covered = 1 - layer.uncovered;
        return [make("rect", { class: "bars", x: x - width / 2, y: y(covered), width, height: 140 - y(covered), "data-covered": covered })];
      }));
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    setTable("loads", ["Layer", ...experts.map((e) => make("th", { scope: "col", class: e === state.expert ? "shown" : null }, `Expert ${e}`)), "Experts per token", "Coverage"],
      layers.map((layer, i) => make("tr", {}, make("th", { scope: "row", class: i === state.layer ? "shown" : null }, `Layer ${layer.layer}`),
        ...layer.load.map((load) => make("td", { "data-load": load }, load.toFixed(2))),
        make("td", {}, layer.fan_out.reduce((sum, share, number) => sum + share * number, 0).toFixed(2)),
        make("td", { "data-uncovered": layer.uncovered }, percent(1 - layer.uncovered)))));
  }

  function drawFavourites() {
    const item = (entry) => make("span", { class: "favourite" },
      make("b", {}, (entry.text || entry.name).replace(/\n/g, "↵")),
      make("small", {}, ` ${entry.taken} of ${entry.times}, ${show(entry.score)}`));
    setTable("favourites", ["Layer", "Expert", "Tokens", make("th", { scope: "col", class: "words" }, "Favourites")], shownLayers().flatMap((i) => shownExperts().map((e) => {
      const list = layers[i].favourites[e], taken = layers[i].chosen.filter((chosen) => chosen.includes(e)).length;
      return make("tr", {}, make("th", { scope: "row" }, layers[i].layer), make("th", { scope: "row" }, e),
        make("td", { class: "number" }, taken), make("td", {}, ...(list.length ? list.map(item) : ["none"])));
    })));
  }

  function draw() {
    const read = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
    state.layer = read("layer");
    state.expert = read("expert");
    drawText();
    drawMap();
    drawHistograms();
    drawLoad();
    drawFavourites();
    for (const button of byId("layer-buttons").children) button.setAttribute("aria-pressed", Number(button.dataset.row) === state.layer && state.layer !== null);
    if (state.token !== null) showToken(state.token);
  }

  facts();
  layerButtons();
  drawOverview();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawOverview);
  const picture = byId("picture");
  picture.addEventListener("click", (event) => {
    const [i, t] = pointed(event);
    chooseLayer(i);
    focusToken(t, false);
  });
  picture.addEventListener("mousemove", (event) => {
    const [i, t] = pointed(event);
    byId("pointed").textContent = `Token ${t + 1}, “${word(t)}”, ${gatesInWords(i, t)}`;
  });
  picture.addEventListener("mouseleave", () => { byId("pointed").textContent = ""; });
  byId("layer-buttons").addEventListener("click", ({ target }) => target.dataset.row && chooseLayer(Number(target.dataset.row)));
  byId("layer-buttons").addEventListener("keydown", (event) => {
    const at = Number(event.target.dataset.row);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: layers.length - 1 }[event.key];
    const button = byId("layer-buttons").children[to];
    if (to === undefined || !button) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    button.tabIndex = 0;
    button.focus();
  });
  const text = byId("text");
  text.replaceChildren(...tokens);
  text.addEventListener("keydown", onKey);
  for (const event of ["mouseover", "focusin"]) {
    text.addEventListener(event, ({ target }) => target.dataset.token && showToken(Number(target.dataset.token)));
  }
  text.addEventListener("click", ({ target }) => target.dataset.token && focusToken(Number(target.dataset.token), true));
  byId("controls").addEventListener("change", draw);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  draw();
  showToken(0);
})();
