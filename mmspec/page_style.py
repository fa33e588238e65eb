"""Style and script of the demo's page; `mmspec.page` puts them inline."""

STYLE = """
:root{--bg:#faf8f5;--ink:#201b33;--soft:#6a6480;--card:#fff;--line:#e7e1ee;--accent:#8f3d96;
--warm:#d9546e;--bar:#8f3d96;--empty:#efeaf3;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14111f;--ink:#eee9f7;--soft:#a59dba;--card:#1d1930;
--line:#332c4a;--accent:#d79be0;--warm:#f5896a;--bar:#c77bd2;--empty:#2a2440;--bad:#ff8a80}}
*{box-sizing:border-box}
.scroll+.note{margin-top:.8rem}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1080px;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:clamp(2rem,5.4vw,3.5rem);line-height:1.1;letter-spacing:-.025em;margin:.4rem 0 1rem;
font-weight:700;text-wrap:balance}
h1 b{background:linear-gradient(90deg,var(--accent),var(--warm));-webkit-background-clip:text;
background-clip:text;color:transparent;font-weight:800}
h2{font-size:1.5rem;letter-spacing:-.01em;margin:3.2rem 0 .6rem}
.brand{margin:0;font-weight:700;letter-spacing:.02em;color:var(--accent)}
.lead{font-size:1.12rem;color:var(--soft);max-width:44rem;margin:0 0 1.6rem}
.note{color:var(--soft);margin:.2rem 0 1rem;max-width:50rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1.1rem 1.2rem}
.numbers,.tiles,.charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.number span{display:block;color:var(--soft);font-size:.92rem}
.number strong{display:block;font-size:2.1rem;line-height:1.25;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.how{list-style:none;counter-reset:how;margin:0;padding:0;display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(250px,1fr))}
.how li{counter-increment:how;padding-left:2.6rem;position:relative}
.how li::before{content:counter(how);position:absolute;left:0;top:.1rem;width:1.8rem;height:1.8rem;
border-radius:50%;background:linear-gradient(135deg,var(--accent),var(--warm));color:var(--bg);
font-weight:700;display:grid;place-items:center}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.6rem;color:var(--soft);
font-size:.9rem;margin:0 0 1rem}
.legend i{width:120px;height:10px;border-radius:5px;
background:linear-gradient(90deg,#26235c,#583695,#a03e94,#d9546e,#f5894c,#fbcf6e)}
button{margin-left:auto;font:inherit;padding:.3rem .95rem;border-radius:99px;cursor:pointer;
border:1px solid var(--accent);background:none;color:var(--accent)}
button:hover{background:var(--accent);color:var(--bg)}
.tile{margin:0;padding:.9rem}
.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:.6rem}
.shot{position:relative}
.shot img{display:block;width:100%;aspect-ratio:1;border-radius:8px;image-rendering:pixelated}
.shot canvas{position:absolute;inset:0 0 auto;width:100%;aspect-ratio:1;border-radius:8px;
image-rendering:pixelated;pointer-events:none}
.shot small{display:block;color:var(--soft);font-size:.78rem;line-height:1.35;margin-top:.35rem;
font-variant-numeric:tabular-nums}
.tile figcaption{margin-top:.6rem;font-size:.92rem;line-height:1.35}
.tile em{color:var(--soft);font-style:normal;white-space:nowrap;font-size:.85em}
.text{margin:0 0 1rem}
.text h3{display:flex;align-items:center;flex-wrap:wrap;gap:.7rem;margin:0 0 .5rem;font-size:1rem}
.text h3 small{color:var(--soft);font-weight:400}
.badge{border:1px solid var(--line);border-radius:99px;padding:.05rem .7rem;color:var(--soft);
font-weight:500;font-size:.85rem}
.gain{color:var(--accent)}
summary{cursor:pointer;color:var(--soft);font-size:.95rem}
.prompt{white-space:pre-wrap;color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;margin:.8rem 0;
font:.86rem/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
mark{color:inherit;border-radius:4px;padding:.1em 0;-webkit-box-decoration-break:clone;
box-decoration-break:clone}
.t0{background:#8f3d9638}.t1{background:#f5894c4a}.t2{background:#3c8fd93d}.t3{background:#d9546e40}
.t4{background:#2fa67a40}
.lane{position:relative;margin-top:.35rem;background:var(--empty);border-radius:6px;overflow:hidden}
.lane i{position:absolute;inset:0 auto 0 0;background:var(--soft);opacity:.28}
.lane.fast i{background:linear-gradient(90deg,var(--accent),var(--warm));opacity:.5}
.lane span{position:relative;display:block;padding:.15rem .6rem;font-size:.84rem;
font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;padding:.4rem 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;white-space:nowrap}
th{font-weight:500;color:var(--soft);font-size:.85rem}
th,td{text-align:right;padding:.5rem .7rem;border-bottom:1px solid var(--line)}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
tr:last-child td{border-bottom:0}
.chart{margin:0}
.chart figcaption{color:var(--soft);font-size:.9rem;margin-bottom:.5rem}
svg{display:block;width:100%;height:auto}
svg rect{fill:var(--bar)}svg line{stroke:var(--line)}svg text{fill:var(--soft);font-size:11px}
.bad{color:var(--bad);margin-left:.5rem}
footer{color:var(--soft);font-size:.92rem}
footer h2{color:var(--ink)}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem 1rem;
overflow-x:auto;color:var(--ink)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
@media(max-width:480px){main{padding:1.8rem .9rem 3rem}.card{padding:.9rem}h2{margin-top:2.4rem}}
"""

# The replay covers what is not committed yet; at rest nothing is covered.
SCRIPT = """
(()=>{const tiles=[...document.querySelectorAll('[data-race]')];
const button=document.getElementById('replay');
if(!tiles.length||!button)return;
const lanes=[];let slowest=0;
for(const tile of tiles){const race=JSON.parse(tile.dataset.race);
 slowest=Math.max(slowest,race.plain);
 for(const shot of tile.querySelectorAll('[data-track]')){
  const canvas=document.createElement('canvas');
  canvas.height=race.steps.length;canvas.width=race.steps[0].length;shot.append(canvas);
  lanes.push({canvas,race,fast:shot.dataset.track==='fast'})}}
const seconds=6,pace=seconds/slowest;
document.getElementById('pace').textContent=pace>=1?
 `${pace.toFixed(1)} times slower than measured`:
 `${(1/pace).toFixed(1)} times faster than measured`;
const cover=getComputedStyle(document.documentElement).getPropertyValue('--empty');
function draw(lane,t){const {canvas,race,fast}=lane,pen=canvas.getContext('2d'),w=canvas.width;
 const length=(fast?race.fast:race.plain)*pace;
 const forwards=fast?race.forwards:w*canvas.height,now=Math.floor(t/length*forwards);
 pen.clearRect(0,0,w,canvas.height);if(now>=forwards)return true;pen.fillStyle=cover;
 race.steps.forEach((row,y)=>row.forEach((step,x)=>{
  if((fast?step:y*w+x)>=now)pen.fillRect(x,y,1,1)}));return false}
let run=0;
function play(){const mine=++run,start=performance.now();
 (function frame(time){if(mine!==run)return;const t=Math.max(0,(time-start)/1000);
  const ended=lanes.map(lane=>draw(lane,t)).every(Boolean);
  if(!ended)requestAnimationFrame(frame)})(start)}
button.hidden=false;button.onclick=play;
if(!matchMedia('(prefers-reduced-motion:reduce)').matches)play()})();
"""
