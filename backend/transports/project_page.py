"""A page about one project: how much its annotators correct, which versions its detector had, what is trained now.

Knows HTML and the project's folder. One page without scripts or anything from elsewhere; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from backend.learning.store import KnownPhoto, Progress, ProjectStore, State, Version

PLOT_WH = (860, 260)
MARGIN = 40  # of the plot, for its axes
AVERAGED = 10  # photos of the line
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .8rem .3rem 0;
border-bottom: 1px solid #ddd; white-space: nowrap } td.n, th.n { text-align: right } svg { width: 100%; height: auto }
.dot { fill: #9bb8dd } .line { fill: none; stroke: #1d5fb4; stroke-width: 2.5 } .axis { stroke: #999 }
.label { font-size: 12px; fill: #555 } .serves { font-weight: 600 } code { background: #f2f2f2; padding: .1rem .3rem }
"""


def project_page(store: ProjectStore, *, learn_every: int, engine_version: str) -> str:
    """The page as HTML. engine_version: of what answers the project's requests now."""
    photos, versions, state = store.photos(), store.versions(), store.state()
    project = store.project_id
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Project {project} - Facings</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body>
<h1>Project {project}</h1>
<p>Boxes come from <code>{escape(engine_version)}</code>{_threshold(state)}.</p>
<h2>What annotators correct</h2>
{_plot(photos)}
<h2>Training</h2>
<p>{escape(_training(store.progress(), learn_every))}</p>
<h2>Versions</h2>
{_table(versions, state)}
<p>Another one serves after <code>facings project rollback {project} --to NUMBER</code>; without <code>--to</code>, the
weights that the project began with.</p>
</body></html>
"""


def _threshold(state: State) -> str:
    if state.score_threshold is None:
        return ""
    return f", with a score of {state.score_threshold:.2f} and above: what would have needed the fewest corrections"


def _training(progress: Progress | None, learn_every: int) -> str:
    if progress is None:
        when = f"after every {learn_every} submitted photos, and " if learn_every else ""
        return f"Nothing is trained now. A training begins {when}when Start Training is pressed in Label Studio."
    left = "" if progress.minutes_left is None else f", about {max(1, round(progress.minutes_left))} min left"
    photos = f" from {progress.photos} photos" if progress.photos else ""
    return f"A training goes on: {progress.stage}{photos}{left}."


def _plot(photos: Sequence[KnownPhoto]) -> str:
    """Corrections per 100 facings of each submitted photo, in the order in which they came, and their running mean."""
    counted = [photo for photo in photos if photo.corrections is not None]
    if not counted:
        return f"<p>{len(photos)} photos were submitted, none of which had boxes before.</p>"
    per_100 = [100 * (photo.corrections or 0) / len(photo.boxes_xyxy) for photo in counted]
    means = []
    for end in range(1, len(counted) + 1):
        part = slice(max(0, end - AVERAGED), end)
        facings = sum(len(photo.boxes_xyxy) for photo in counted[part])
        means.append(100 * sum(photo.corrections or 0 for photo in counted[part]) / facings)
    width, height = PLOT_WH
    top = max(20.0, *per_100)
    across = (width - 2 * MARGIN) / max(1, len(counted) - 1)

    def at(place: int, value: float) -> tuple[float, float]:
        return MARGIN + place * across, height - MARGIN - value / top * (height - 2 * MARGIN)

    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(photo.submitted_at)}: {value:.0f}</title>'
        "</circle>"
        for photo, value, (x, y) in (
            (photo, value, at(place, value)) for place, (photo, value) in enumerate(zip(counted, per_100, strict=True))
        )
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(place, value) for place, value in enumerate(means)))
    marks = "".join(
        f'<text class="label" x="{MARGIN - 8}" y="{at(0, value)[1] + 4:.1f}" text-anchor="end">{value:.0f}</text>'
        for value in (0.0, top / 2, top)
    )
    base = height - MARGIN
    first, last = (escape(photo.submitted_at[:10]) for photo in (counted[0], counted[-1]))
    return f"""<p>The last {min(AVERAGED, len(counted))} photos needed
<b>{means[-1]:.0f} corrections per 100 facings</b>: boxes to add, to delete, or to drag. Each dot is a photo, the line
the mean of {AVERAGED}.</p>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="Corrections per 100 facings over time">
<line class="axis" x1="{MARGIN}" y1="{base}" x2="{width - MARGIN}" y2="{base}"/>
<line class="axis" x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{base}"/>{marks}{dots}
<polyline class="line" points="{line}"/>
<text class="label" x="{MARGIN}" y="{height - 12}">{first}</text>
<text class="label" x="{width - MARGIN}" y="{height - 12}" text-anchor="end">{last}</text>
</svg>"""


def _table(versions: Sequence[Version], state: State) -> str:
    if not versions:
        return "<p>None yet: the weights that the project began with serve.</p>"
    rows = "".join(
        f"<tr{' class=serves' if version.number == state.serving else ''}><td>{version.number}</td>"
        f"<td>{escape(version.made_at[:16].replace('T', ' '))}</td><td>{escape(version.parent)}</td>"
        f'<td class="n">{version.learned}</td><td class="n">{version.minutes:.0f}</td>'
        f'<td class="n">{version.before.corrections:.1f} → {version.after.corrections:.1f}</td>'
        f'<td class="n">{version.before.ap:.3f} → {version.after.ap:.3f}</td>'
        f"<td>{_fate(version, state)}</td></tr>"
        for version in reversed(versions)
    )
    return (
        "<table><tr><th>Version</th><th>Made</th><th>Began with</th><th class=n>Photos</th><th class=n>Minutes</th>"
        "<th class=n>Corrections per 100</th><th class=n>AP</th><th></th></tr>"
        f"{rows}</table><p>Corrections and AP are measured on photos that are never learned from.</p>"
    )


def _fate(version: Version, state: State) -> str:
    if version.number == state.serving:
        return "serves"
    return "was better" if version.is_promoted else "no better, kept aside"
