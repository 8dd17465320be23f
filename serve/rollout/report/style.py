"""The page's stylesheet: light and dark by the reader's setting, ink on white in print. No fonts."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#16202c;--soft:#586574;--line:#dde3ea;--card:#f5f7fa;
--grid:#e8ecf1;
--stable:#2563eb;--canary:#c2620a;--good:#12713a;--goodbg:#e0f4e7;--bad:#b3211f;--badbg:#fde8e7;
--wait:#8a5a00;
--waitbg:#fdf1d7;--idle:#66727f;--idlebg:#e9edf2;--m1:#6d3bd1;--m2:#0a7f86;--m3:#b4366f;--m4:#3f7d20;
--m5:#a15c00;
--m6:#2b5fb8;--del:#fbd9d6;--ins:#cdeed6}
@media (prefers-color-scheme:dark){:root{--bg:#11161d;--ink:#e6ebf1;--soft:#9aa7b5;--line:#2d3743;
--card:#1a212b;
--grid:#242d38;--stable:#79a7ff;--canary:#f2a24c;--good:#6fd494;--goodbg:#133222;--bad:#ff8f87;
--badbg:#3d1a1b;
--wait:#f0c163;--waitbg:#3a2d10;--idle:#9aa7b5;--idlebg:#27303b;--m1:#b79bff;--m2:#55c7cc;--m3:#f28ab5;
--m4:#93cf72;
--m5:#e6ac5c;--m6:#86b1f5;--del:#5b2524;--ins:#1d4a2d}}
@media print{:root{color-scheme:light;--bg:#fff;--ink:#000;--soft:#444;--line:#bbb;--card:#fff;--grid:#ddd;
--stable:#1d4fc4;
--canary:#a04d00;--good:#0b5a2c;--goodbg:#fff;--bad:#961412;--badbg:#fff;--wait:#6b4600;--waitbg:#fff;
--idle:#555;
--idlebg:#fff;--m1:#5a2bb5;--m2:#075f65;--m3:#8f2455;--m4:#2f6215;--m5:#7c4700;--m6:#1f4a94;--del:#fff;
--ins:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:.2rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0;max-width:76ch}
.soft,figcaption,caption,.where{color:var(--soft)}
.where{font-size:.9rem;margin:0}
.lead{font-size:1.1rem;margin:.8rem 0 1.1rem;padding:.8rem 1rem;background:var(--card);
border-left:4px solid var(--idle);
border-radius:0 6px 6px 0;max-width:none;overflow-wrap:anywhere}
.lead.good{border-color:var(--good)}.lead.bad{border-color:var(--bad)}.lead.waiting{border-color:var(--wait)}
.badge{display:inline-block;font-size:.85rem;font-weight:600;padding:.1rem .6rem;border-radius:99px;
white-space:nowrap;
background:var(--idlebg);color:var(--idle);border:1px solid currentColor}
.badge.good{background:var(--goodbg);color:var(--good)}.badge.bad{background:var(--badbg);color:var(--bad)}
.badge.waiting{background:var(--waitbg);color:var(--wait)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(122px,1fr));gap:.7rem;margin:1rem 0;
padding:0;list-style:none}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.tiles b{display:block;font-size:1.25rem;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles span{display:block;font-size:.82rem;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:.5rem 0;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{font-weight:600;color:var(--soft);font-size:.82rem;vertical-align:bottom}
tbody th{font-weight:600}tbody th .soft{font-weight:400;font-size:.85rem}
.judged th:first-child{min-width:200px}
td.n,th.n{text-align:right;white-space:nowrap}
.meter{display:block;width:105px;height:8px;margin-top:.3rem;border-radius:4px;background:var(--grid);
overflow:hidden}
.meter i{display:block;height:100%;border-radius:4px;background:var(--idle)}
.meter.good i{background:var(--good)}.meter.bad i{background:var(--bad)}
figure{margin:1rem 0;break-inside:avoid}
figcaption{font-size:.88rem;margin-bottom:.2rem;max-width:80ch}figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto;font-family:inherit}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:.2rem 1.4rem}
.pair figure{margin:.5rem 0}
svg text{font-size:12px;fill:var(--soft)}svg .middle{text-anchor:middle}svg .end{text-anchor:end}
svg .label{font-weight:600;fill:var(--ink)}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--soft)}
svg .zero{stroke:var(--soft);stroke-dasharray:2 3}svg .label.zero{stroke:none;fill:var(--soft);
font-weight:400}
svg .limit{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:7 4}svg .label.limit{stroke:none}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .band{stroke:none;opacity:.17}
svg .line.stable{stroke:var(--stable)}svg .line.canary{stroke:var(--canary)}
svg .line.stable{stroke-dasharray:6 2}
svg .dot.stable,svg .band.stable,svg .label.stable{fill:var(--stable)}
svg .dot.canary,svg .band.canary,svg .label.canary{fill:var(--canary)}
svg .ribbon.idle{fill:var(--idlebg)}svg .ribbon.going{fill:var(--canary);opacity:.28}
svg .ribbon.waiting{fill:var(--waitbg)}
svg .ribbon.good{fill:var(--goodbg)}svg .ribbon.bad{fill:var(--badbg)}svg .ribbon.ended{fill:var(--idlebg)}
svg .ribbon{stroke:var(--line)}svg .ribbon-name{font-size:11px;fill:var(--ink)}
details{margin:.3rem 0}summary{cursor:pointer;color:var(--soft);font-size:.88rem}
summary:focus-visible,a:focus-visible{outline:2px solid var(--stable);outline-offset:2px}
.example{border:1px solid var(--line);border-radius:8px;margin:1rem 0;break-inside:avoid;overflow:hidden}
.example>header{padding:.55rem .9rem;background:var(--card);border-bottom:1px solid var(--line)}
.example h4{margin:0;font-size:.95rem}.example header p{margin:.2rem 0 0;max-width:none}
.sides{display:grid;grid-template-columns:1fr 1fr}
.sides>div{padding:.6rem .9rem;min-width:0}.sides>div+div{border-left:1px solid var(--line)}
@media(max-width:640px){main>figure{overflow-x:auto}main>figure>svg{min-width:640px}.sides{grid-template-columns:1fr}.sides>div+div{border-left:0;
border-top:1px solid var(--line)}}
.who{font-size:.85rem;font-weight:600;margin:0}.who.stable{color:var(--stable)}
.who.canary{color:var(--canary)}
.meta{font-size:.8rem;color:var(--soft);margin:.1rem 0 .4rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.92rem;margin:0;max-width:none}
del{background:var(--del);text-decoration:line-through;text-decoration-thickness:1px}
ins{background:var(--ins);text-decoration:underline;text-underline-offset:2px}
code,pre{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.86rem}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;
overflow-x:auto}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media print{main{max-width:none;padding:0}body{font-size:11pt}
details::details-content{content-visibility:visible;
block-size:auto}summary{display:none}h2{break-after:avoid}a{color:inherit}.scroll{overflow:visible}}
""" + "".join(
    f"svg .line.m{i},svg .line.m{i}{{stroke:var(--m{i});stroke-dasharray:{dash}}}"
    f"svg .label.m{i},svg .dot.m{i}{{fill:var(--m{i})}}\n"
    for i, dash in enumerate(("none", "9 3", "3 3", "12 3 3 3", "6 6", "2 5"), start=1)
)
