"""The frame of `report.html`: one file, no scripts, nothing fetched, light and dark."""

from __future__ import annotations

from html import escape

# The policy makes the browser refuse whatever the file itself does not hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --ink:#1b2129; --soft:#5b6673; --page:#fbfbfa; --card:#ffffff;
  --line:#e2e5e9; --mark:#eaf6f3; --accent:#14806f; --bad:#b3263e; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e8ed; --soft:#9aa5b1; --page:#14171b;
  --card:#1b1f25; --line:#2d333b; --mark:#17312d; --accent:#4cc3ae; --bad:#f0768a; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:960px; margin:0 auto; padding:44px 20px 72px }
h1 { font-size:28px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em }
h2 { font-size:18px; margin:44px 0 8px }
p { margin:8px 0; max-width:72ch }
.soft, figcaption { color:var(--soft); font-size:14px }
.verdict { border-left:4px solid var(--accent); background:var(--card); padding:12px 16px;
  margin:22px 0; border-radius:0 6px 6px 0 }
.verdict.bad { border-color:var(--bad) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:12px;
  margin:20px 0 }
.tile { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:12px 16px }
.tile b { display:block; font-size:24px; font-variant-numeric:tabular-nums; letter-spacing:-.01em }
.tile span { color:var(--soft); font-size:13.5px }
.scroll { overflow-x:auto; margin:12px 0 }
table { border-collapse:collapse; width:100%; font-size:14.5px; background:var(--card);
  border:1px solid var(--line) }
th,td { text-align:left; padding:7px 9px; border-bottom:1px solid var(--line); white-space:nowrap }
th { font-weight:600; color:var(--soft); font-size:13px }
.n { text-align:right; font-variant-numeric:tabular-nums }
tr.marked td { background:var(--mark); font-weight:600 }
tr:last-child td { border-bottom:0 }
figure { margin:14px 0; padding:14px; background:var(--card); border:1px solid var(--line);
  border-radius:8px }
figure svg { width:100%; height:auto; display:block }
figcaption { margin-top:8px }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:14px;
  overflow-x:auto; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; white-space:pre-wrap }
pre em { font-style:normal; color:var(--accent); font-weight:600 }
details { margin:12px 0 } summary { cursor:pointer; color:var(--soft); font-size:14px }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 18px; font-size:14px }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
"""


def page(title: str, lead: str, body: str) -> str:
    """A complete document. `body` is HTML; title and lead are plain text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n<p class=soft>{escape(lead)}</p>\n{body}\n"
        "</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>\n"


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def tiles(values: list[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    cells = (
        f"<div class=tile><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for value, label in values
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def definitions(values: dict[str, str]) -> str:
    pairs = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return f"<dl>{''.join(pairs)}</dl>"
