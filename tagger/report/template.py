"""The report's HTML, style and script. The page is whole without the script, which sorts and filters the tag table."""

REPORT_STYLE = """
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
a { color: var(--link); }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0 0; font-size: .9rem; }
.about dt { color: var(--faint); }
.about dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.headline { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem;
  margin: 1rem 0 0; }
.headline > div { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem .9rem; }
.headline dt { color: var(--faint); font-size: .85rem; }
.headline dd { margin: 0; }
.headline .value { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.headline .note { font-size: .8rem; color: var(--faint); line-height: 1.3; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
caption { text-align: left; color: var(--faint); padding-bottom: .4rem; }
td, th { padding-right: .8rem; }
th { font-weight: 600; font-size: .85rem; }
tbody th { font-weight: 400; font-size: inherit; }
tbody tr { border-top: 1px solid var(--line); }
.empty td, .empty th { color: var(--faint); }
th.name, td.name { min-width: 7rem; max-width: 20rem; overflow-wrap: break-word; }
.groups th { white-space: nowrap; }
.stack { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin: .3rem 0;
  background: var(--well); }
.stack span { display: block; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.enough { background: #0072b2; } .few { background: #e69f00; } .without { background: #9aa1ac; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .8rem; padding: 0;
  list-style: none; margin: .6rem 0 0; }
.mistakes > li { border: 1px solid var(--edge); border-radius: 8px; padding: .5rem; min-width: 0; }
.mistakes img, .mistakes .withheld { display: flex; align-items: center; justify-content: center; width: 100%;
  aspect-ratio: 1; object-fit: contain; background: var(--well); border-radius: 5px; }
.mistakes p { margin: .4rem 0 .2rem; font-size: .85rem; overflow-wrap: anywhere; }
.mistakes ul { list-style: none; margin: 0; padding: 0; font-size: .8rem; }
.mistakes ul li { display: flex; gap: .35rem; }
.mistakes .tag { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.mistakes .mark { width: .9rem; text-align: center; font-weight: 700; }
.right .mark { color: var(--right); } .extra .mark { color: var(--wrong); }
.missed, .missed .mark { color: var(--faint); }
.this { font-weight: 600; }
.path { color: var(--faint); font-size: .7rem; display: block; margin-top: .3rem; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: end; margin-bottom: .6rem; }
.tools label { display: flex; flex-direction: column; font-size: .85rem; color: var(--faint); gap: .15rem; }
.tools label.tick { flex-direction: row; align-items: center; gap: .4rem; padding-bottom: .35rem; }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--faint);
  border-radius: 5px; padding: .25rem .5rem; }
th button { border: 0; padding: 0; font-weight: 600; background: none; cursor: pointer;
  text-decoration: underline dotted; text-underline-offset: 3px; white-space: nowrap; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@media (max-width: 34rem) {
  main { padding: 1rem .6rem 2rem; } section { padding: .8rem; }
  .about { grid-template-columns: 1fr; } .about dd { margin-bottom: .3rem; }
  .headline { grid-template-columns: 1fr 1fr; } .headline > div { padding: .5rem .6rem; }
  .mistakes { grid-template-columns: 1fr 1fr; }
  #tag-table th:nth-child(2), #tag-table td:nth-child(2) { display: none; }
}
@media print {
  body { background: none; font-size: 11px; } main { max-width: none; padding: 0; }
  nav, .tools, #more { display: none; }
  section { border: 0; padding: 0; break-inside: auto; } figure, .mistakes > li, tr { break-inside: avoid; }
}
"""

SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("tag-data").textContent);
  const step = 100, missing = "\\u2013";
  const body = document.querySelector("#tag-table tbody");
  const heads = [...document.querySelectorAll("#tag-table thead th")];
  const find = document.getElementById("find"), category = document.getElementById("category");
  const known = document.getElementById("known"), count = document.getElementById("tag-count");
  const more = document.getElementById("more");
  let column = 3, rising = false, shown = step, rows = [];
  const text = (row, i) => row[i] === null ? missing
    : i === 1 ? data.categories[row[i]] : i < 2 ? row[i]
    : i < 4 ? row[i].toLocaleString("en") : row[i].toFixed(3);
  function draw() {
    body.replaceChildren(...rows.slice(0, shown).map(row => {
      const line = document.createElement("tr");
      row.forEach((_, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (i > 1) cell.className = "count"; else cell.className = "name";
        if (!i) cell.scope = "row";
        // A long name may break after these, as in the rows that came with the page.
        if (i) cell.textContent = text(row, i);
        else row[0].split(/(?<=[_:\\/])/).forEach((part, n) => {
          if (n) cell.append(document.createElement("wbr"));
          cell.append(part);
        });
        line.append(cell);
      });
      return line;
    }));
    const number = value => value.toLocaleString("en");
    count.textContent = `${number(Math.min(shown, rows.length))} of ${number(rows.length)} tags`;
    more.hidden = shown >= rows.length;
  }
  function choose() {
    const words = find.value.toLowerCase(), wanted = category.value === "" ? null : Number(category.value);
    rows = data.tags.filter(row => (wanted === null || row[1] === wanted) && (!known.checked || row[3] > 0)
      && row[0].toLowerCase().includes(words));
    const sign = rising ? 1 : -1;
    const order = (a, b) => typeof a === "string" ? a.localeCompare(b, "en") : a - b;
    rows.sort((a, b) => (a[column] === null) - (b[column] === null)
      || sign * (column === 1 ? order(text(a, 1), text(b, 1)) : order(a[column], b[column])) || order(a[0], b[0]));
    heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", rising ? "ascending" : "descending")
      : head.removeAttribute("aria-sort"));
    shown = step;
    draw();
  }
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => { rising = column === i ? !rising : i < 2; column = i; choose(); });
    head.replaceChildren(button);
  });
  for (const input of [find, category, known]) input.addEventListener("input", choose);
  more.addEventListener("click", () => { const first = shown; shown += step; draw();
    body.rows[first].tabIndex = -1; body.rows[first].focus(); });
  document.getElementById("tools").hidden = false;
  document.getElementById("no-script").hidden = true;
  choose();
})();
"""

PAGE = """{% macro score(value) %}{{ "–" if value is none else "%.3f" | format(value) }}{% endmacro %}
{% macro mean(value, of) %}{{ score(value.value) }}{% if value.value is not none %} <span class="faint">of
{{ value.over | number }}</span>{% endif %}{% endmacro %}
{% macro ranked(title, tags) %}
<section>
<h2>{{ title }}</h2>
{% if tags %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}"><table>
<thead><tr><th scope="col" class="name">tag</th><th scope="col" class="count">AP</th>
<th scope="col" class="count">positives</th><th scope="col" class="count">trained on</th></tr></thead>
<tbody>
{% for tag in tags %}
<tr><th scope="row" class="name">{{ tag.name | breakable }}</th>
<td class="count">{{ score(tag.average_precision) }}</td>
<td class="count">{{ tag.positives | number }}</td><td class="count">{{ tag.training_images | number }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>None: {{ "no other tag has" if report.ranked else "no tag has" }} a positive among the evaluated images.</p>
{% endif %}
</section>
{% endmacro %}
{% macro groups(title, label, rows) %}
<div class="scroll groups" tabindex="0" role="region" aria-label="{{ title }}"><table>
<caption>{{ title }}</caption>
<thead><tr><th scope="col">{{ label }}</th><th scope="col" class="count">tags</th>
<th scope="col" class="count">positives</th><th scope="col" class="count">mAP</th>
<th scope="col" class="count">F1 macro</th><th scope="col" class="count">F1 micro</th>
<th scope="col" class="count">calibration error</th><th scope="col" class="count">error per positive</th></tr></thead>
<tbody>
{% for group in rows %}
{% if group.empty %}
<tr class="empty"><th scope="row">{{ group.name }}</th><td class="count">0</td><td colspan="6">no tag</td></tr>
{% else %}
<tr><th scope="row">{{ group.name }}</th><td class="count">{{ group.num_tags | number }}</td>
<td class="count">{{ group.num_positives | number }}</td><td class="count">{{ mean(group.mAP) }}</td>
<td class="count">{{ mean(group.f1_macro) }}</td><td class="count">{{ score(group.f1_micro.value) }}</td>
<td class="count">{{ "–" if group.calibration.error is none else "%.4f" | format(group.calibration.error) }}</td>
<td class="count">{{ score(group.calibration.error_per_true) }}</td></tr>
{% endif %}
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro mistakes(shown) %}
<ul class="mistakes">
{% for each in shown %}
<li>{% if each.source %}<img src="{{ each.source }}" alt="{{ each.alt }}">
{% else %}<div class="withheld">not shown: rated {{ each.withheld }}</div>{% endif %}
<ul>
{% for tag in each.tags %}
<li class="{{ tag.verdict }}{{ " this" if tag.this }}"><span class="mark" aria-hidden="true">{{ tag.mark }}</span>
<span class="tag">{{ tag.name | breakable }}<span class="hidden"> ({{ tag.verdict }})</span></span>
<span>{{ "%.2f" | format(tag.score) }}</span></li>
{% endfor %}
</ul>
{% if each.num_more %}<p class="faint">and {{ each.num_more }} more</p>{% endif %}
<span class="path" title="{{ each.path }}">{{ each.path | ending }}</span></li>
{% endfor %}
</ul>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ report.title }}</h1>
<dl class="about">
{% for label, text in report.facts.items() %}
<dt>{{ label }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
<nav aria-label="sections"><a href="#plots">Plots</a><a href="#groups">Groups</a><a href="#ranked">Best and worst</a>
<a href="#mistakes">Confident mistakes</a>
{% if report.hierarchy is not none %}<a href="#hierarchy">Hierarchy</a>{% endif %}
<a href="#tags">All tags</a></nav>

<dl class="headline">
{% for figure in headline %}
<div><dt>{{ figure.name }}</dt><dd class="value">{{ figure.value }}</dd>
<dd class="note">{% if figure.interval %}{{ figure.interval }}<br>{% endif %}{{ figure.note }}</dd></div>
{% endfor %}
</dl>
<p class="faint">Intervals are of 95 %, over which images happened to be held out.</p>

<section>
<h2>Coverage: tags by their positives among the evaluated images</h2>
<div class="stack" aria-hidden="true">
{% for kind, number, words in coverage if number %}
<span class="{{ kind }}" style="width: {{ 100 * number / report.summary.coverage.num_tags }}%"></span>
{% endfor %}
</div>
<ul class="key">
{% for kind, number, words in coverage %}
<li><i class="{{ kind }}"></i>{{ number | number }} {{ words }}</li>
{% endfor %}
</ul>
</section>

<section id="plots">
<h2>Plots</h2>
{% if plots %}
<div class="plots">
{% for plot in plots %}
<figure><figcaption>{{ plot.title }}</figcaption><img src="{{ plot.source }}" alt="{{ plot.alt }}"></figure>
{% endfor %}
</div>
{% endif %}
{% if not report.curves %}
<p>No tag has a positive among the evaluated images: there is no average precision and no curve to draw.</p>
{% endif %}
</section>

<section id="groups">
<h2>Groups of tags</h2>
{{ groups("By the number of training images with the tag", "training images", report.summary.by_frequency) }}
{% if report.summary.by_category | length > 1 %}
<br>
{{ groups("By category", "category", report.summary.by_category) }}
{% endif %}
<p class="faint">mAP and F1 macro: mean over as many tags as stand beside it. Calibration error: mean distance between
predicted probabilities and what came true, over all decisions, and over the positives alone.</p>
</section>

<div class="columns" id="ranked">
{{ ranked("Best tags", report.best) }}
{{ ranked("Worst tags", report.worst) }}
</div>

<section id="mistakes">
<h2>Confident mistakes</h2>
<p class="faint"><span class="right"><span class="mark">✓</span></span> there and predicted,
<span class="extra"><span class="mark">✗</span></span> predicted only, <span class="mark">–</span> there only; with the
predicted probability. The mistake comes first, in bold.</p>
<h3>Predicted, and not among the image's tags <span class="faint">(labels that are missing show here)</span></h3>
{% if extra %}{{ mistakes(extra) }}{% else %}<p>None.</p>{% endif %}
<h3>Among the image's tags, and not predicted <span class="faint">(found far less likely than the tag is
common)</span></h3>
{% if missed %}{{ mistakes(missed) }}{% else %}<p>None.</p>{% endif %}
</section>

{% if report.hierarchy is not none %}
<section id="hierarchy">
<h2>Hierarchy</h2>
<table>
<caption>Predicted and true tags, each with all that it implies</caption>
<thead><tr><th scope="col">over</th>
<th scope="col" class="count">precision</th><th scope="col" class="count">recall</th>
<th scope="col" class="count">F1</th></tr></thead>
<tbody>
{% for label, found in (("all tags", report.hierarchy.all_tags),
  ("the %d tags that imply or are implied" % report.hierarchy.num_related_tags, report.hierarchy.related_tags)) %}
<tr><th scope="row">{{ label }}</th>{% for value in (found.precision, found.recall, found.f1) %}
<td class="count">{{ score(value | known) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p>{{ score(report.hierarchy.consistency | known) }} of {{ report.hierarchy.child_decisions | number }} predicted tags
that imply others come with all of them. A tag's probability exceeds that of what it implies by
{{ score(report.hierarchy.mean_violation | known) }} on average ({{ report.hierarchy.num_pairs | number }} pairs).</p>
{% if exclusive %}
<div class="scroll" tabindex="0" role="region" aria-label="Exclusive groups"><table>
<caption>Tags that exclude each other{% if report.exclusive | length > exclusive | length %}: the
{{ exclusive | length }} groups most often violated of {{ report.exclusive | length | number }}{% endif %}</caption>
<thead><tr><th scope="col">group</th><th scope="col" class="count">images that get one</th>
<th scope="col" class="count">that get several</th></tr></thead>
<tbody>
{% for group in exclusive %}
<tr><th scope="row" class="name">{{ group.names | join(", ") | truncate(160) }}</th>
<td class="count">{{ group.decided | number }}</td><td class="count">{{ group.violated | number }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
{% endif %}

<section id="tags">
<h2>All tags</h2>
<div class="tools" id="tools" role="search" hidden>
<label>Find a tag<input id="find" type="search" autocomplete="off"></label>
<label>Category<select id="category"><option value="">all</option>
{% for name in table.categories %}<option value="{{ loop.index0 }}">{{ name }}</option>{% endfor %}</select></label>
<label class="tick"><input id="known" type="checkbox">with positives alone</label>
<span id="tag-count" role="status" class="faint"></span>
</div>
<p class="faint" id="no-script">{% if table.tags | length > static | length %}The {{ static | length | number }} tags
with the most positives; with scripts allowed, all {{ table.tags | length | number }} can be searched
here.{% endif %}</p>
{% if table.left_out %}
<p>{{ table.left_out | number }} tags with the fewest positives are left out of this page; all are in
{{ report.everything_in }}.</p>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="All tags"><table id="tag-table">
<caption>Precision, recall and F1 at the tag's threshold</caption>
<thead><tr>{% for name in columns %}
<th scope="col" class="{{ "name" if loop.index0 < 2 else "count" }}">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in static %}
<tr><th scope="row" class="name">{{ row[0] | breakable }}</th><td class="name">{{ table.categories[row[1]] }}</td>
<td class="count">{{ row[2] | number }}</td><td class="count">{{ row[3] | number }}</td>
{% for value in row[4:] %}<td class="count">{{ score(value) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p><button type="button" id="more" hidden>Show 100 more</button></p>
</section>
</main>
<script type="application/json" id="tag-data">
{{ {"categories": table.categories, "tags": table.tags} | tojson }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
