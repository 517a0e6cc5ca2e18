"""A page for one photo: drop it, see all boxes, click on one object after another, take the cut-out and the boxes away.

Knows Gradio and the page's script. What a click means is known by the workbench, how it looks by photo_view. The
browser gets the photo once, small enough to look at, and after each click only the marks over it, as SVG in photo
pixels. The page asks no other host for anything.

Dropped files lie in Gradio's folder until they are read, a moment later; what nobody asks about goes after a minute.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from backend.errors import AuthError, FacingsError, PhotoTooLarge, RequestError, extra_needed
from backend.metrics import CONTENT_TYPE
from backend.photos.files import display_name
from backend.reporting import log_event
from backend.service import Service
from backend.settings import MIB, Settings
from backend.transports import workbench
from backend.transports.credentials import check_credentials
from backend.transports.fields import field, json_type, number
from backend.transports.http import STATUSES
from backend.transports.photo_view import OBJECT_COLOUR, marks, view
from backend.transports.workbench import Work, Workbench

with extra_needed("page", "--page"):
    import gradio as gr
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Response
    from fastapi.security import HTTPBasic, HTTPBasicCredentials
    from gradio.utils import get_upload_folder

    from backend.transports.page_gate import Gate

Found = TypeVar("Found")

LOOPBACK = "127.0.0.1"
BASIC = HTTPBasic(auto_error=False)  # out here, where FastAPI looks for what annotations name
FILES_KEPT_S = 60
MAX_STEM = 80  # characters of the photo's name in those of downloaded files
STOP_S = 3  # for answers that are on their way when the page is stopped
ON, OFF = "On the object", "Not on the object"
HELP = (
    "**Click** an object to get its outline; further clicks, on it or not on it, correct it. **Drag** a rough "
    "rectangle around an object that clicks do not find. Hold **Alt** for a click that is not on the object.\n\n"
    "All boxes that you see, the object's in place of those under it, are downloaded as COCO; the object is cut out as "
    "a PNG with a transparent background."
)
WELCOME = "Every facing on your photo gets a box. It goes to no other server than this one."
NOTHING = "Nothing was found there; the boxes are as they were."

TEMPLATE = """<input id="chooser" type="file" accept="image/*" hidden>
{{#if photo}}<svg viewBox="0 0 ${across} ${down}" role="img" aria-label="The photo with its boxes">
<image href="${photo}" width="${across}" height="${down}" preserveAspectRatio="none"/><g>${value}</g></svg>
{{else}}<div class="empty">Drop a photo of a shelf here, or click to choose one</div>{{/if}}"""
CSS = """
footer { display: none !important; }
.gradio-container main { padding: 8px !important; }
#shelf svg { display: block; width: 100%; height: auto; max-height: calc(100vh - 40px); margin: auto;
  cursor: crosshair; user-select: none; touch-action: manipulation; border-radius: 6px; }
#shelf svg > g { pointer-events: none; }
#shelf rect, #shelf polygon { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2px; }
#shelf .object { stroke-width: 3px; }
#shelf .tint { image-rendering: pixelated; }
#shelf .empty { display: flex; align-items: center; justify-content: center; min-height: calc(100vh - 60px);
  border: 2px dashed var(--border-color-primary); border-radius: 6px; font-size: 20px; cursor: pointer; }
#shelf circle { stroke: white; vector-effect: non-scaling-stroke; stroke-width: 2px; }
#saver { display: none; }
#status { font-weight: 600; padding: 0 !important; }
#status .failed { color: #d01818; }
"""
# A press and a release at one place are a click, elsewhere a rectangle; a finger that moves scrolls the page.
SCRIPT = """
const CLICK_PX = 5;
let begun = null;
const picture = () => element.querySelector('svg');
const place = (event) => {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture().getScreenCTM().inverse());
  return [at.x, at.y];
};
const end = () => { element.querySelector('.drawn')?.remove(); begun = null; };
const isDrag = (event) => Math.hypot(event.clientX - begun.clientX, event.clientY - begun.clientY) > CLICK_PX;
element.addEventListener('pointerdown', (event) => {
  if (!picture()?.contains(event.target) || event.button !== 0) return;
  event.preventDefault();
  begun = { clientX: event.clientX, clientY: event.clientY, at: place(event) };
  if (event.pointerType !== 'touch') picture().setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (!begun || !isDrag(event)) return;
  const [x, y] = place(event);
  let box = element.querySelector('.drawn');
  if (!box) {
    box = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
    box.setAttribute('class', 'drawn');
    box.setAttribute('stroke', 'OBJECT_COLOUR');
    picture().appendChild(box);
  }
  box.setAttribute('x', Math.min(x, begun.at[0]));
  box.setAttribute('y', Math.min(y, begun.at[1]));
  box.setAttribute('width', Math.abs(x - begun.at[0]));
  box.setAttribute('height', Math.abs(y - begun.at[1]));
});
element.addEventListener('pointerup', (event) => {
  if (!begun) return;
  const data = isDrag(event) ? { corners: [begun.at, place(event)] } : { point: begun.at, alt: event.altKey };
  end();
  trigger('select', { ...data, on: document.querySelector('#kind input:checked')?.value !== 'OFF_CHOICE' });
});
element.addEventListener('pointercancel', end);
const chooser = () => element.querySelector('#chooser');
const send = async (file) => {
  if (!file) return;
  const about = { name: file.name, size: file.size };
  try {
    const { path } = await upload(file);
    trigger('upload', { ...about, file: path });
  } catch {
    trigger('upload', about);  // the server tells why
  }
};
element.addEventListener('change', async () => { await send(chooser().files[0]); chooser().value = ''; });
element.addEventListener('click', (event) => { if (event.target.closest('.empty')) chooser().click(); });
element.addEventListener('dragover', (event) => event.preventDefault());
element.addEventListener('drop', (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); });
""".replace("OBJECT_COLOUR", OBJECT_COLOUR).replace("OFF_CHOICE", OFF)
CHOOSE = "() => document.querySelector('#chooser').click()"
# A file comes as JSON, and is forgotten by the page's state as soon as it is saved.
SAVE = """
watch('value', () => {
  if (!props.value) return;
  const { name, type, base64 } = JSON.parse(props.value);
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
"""


def create_app(settings: Settings, service: Service) -> FastAPI:
    """The page at / and its metrics at /metrics, both with the settings' password where they have one."""
    return asyncio.run(_create_app(settings, service))  # Gradio leaves event loops open where it finds none running


async def _create_app(settings: Settings, service: Service) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = _Page(settings, service)

    app.add_middleware(Gate, max_photo_bytes=settings.max_photo_bytes)

    @app.get("/metrics")
    def metrics(given: Annotated[HTTPBasicCredentials | None, Depends(BASIC)] = None) -> Response:
        if not _may_enter(settings, given.username if given else None, given.password if given else None):
            raise HTTPException(401, headers={"WWW-Authenticate": 'Basic realm="Facings"'})
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        auth=(lambda user, password: _may_enter(settings, user, password)) if has_password(settings) else None,
        max_file_size=settings.max_photo_bytes,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
    )
    return app


def serve(settings: Settings, service: Service, announce: Callable[[str], None]) -> None:
    """Serves the page until SIGTERM or SIGINT. announce: gets the page's address once it can be opened.

    Without a password the page listens on the loopback address, whatever HOST says.
    """
    host = settings.host if has_password(settings) else LOOPBACK
    config = uvicorn.Config(
        create_app(settings, service),
        host=host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=STOP_S,
    )
    with config.bind_socket() as listener:
        listener.listen()
        announce(f"http://{host}:{settings.port}")
        uvicorn.Server(config).run(sockets=[listener])


def has_password(settings: Settings) -> bool:
    return settings.basic_auth_user is not None


def _may_enter(settings: Settings, user: str | None, password: str | None) -> bool:
    try:
        check_credentials(settings, user, password)
    except AuthError:
        return False
    return True


class _Page:
    def __init__(self, settings: Settings, service: Service) -> None:
        self._settings, self._service = settings, service
        self._workbench = Workbench(max_bytes=settings.photo_cache_mb * MIB)

    def blocks(self) -> gr.Blocks:
        """The page's parts, and what they do."""
        blocks = gr.Blocks(
            title="Facings", fill_width=True, analytics_enabled=False, delete_cache=(FILES_KEPT_S, FILES_KEPT_S)
        )
        with blocks:
            blocks.state_session_capacity = workbench.MAX_WORKS
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    shelf = gr.HTML(
                        "", html_template=TEMPLATE, js_on_load=SCRIPT, elem_id="shelf", photo="", across=0, down=0
                    )
                with gr.Column(scale=1, min_width=260):
                    status = gr.HTML(_status(WELCOME), elem_id="status")
                    gr.Radio([ON, OFF], value=ON, label="The next click is", interactive=True, elem_id="kind")
                    next_object = gr.Button("New object", size="md", elem_id="next")
                    remove = gr.Button("Remove object", size="md", elem_id="remove")
                    cut_out = gr.Button("Download cut-out", variant="primary", size="md", elem_id="cutout")
                    coco = gr.Button("Download all boxes", size="md", elem_id="coco")
                    choose = gr.Button("Choose another photo", size="md", elem_id="choose")
                    gr.Markdown(HELP)
                    saver = gr.HTML("", html_template="", js_on_load=SAVE, elem_id="saver")
            # No call has a component's value as input: Gradio would look for files and addresses in it, and fetch them.
            # Each is a request of its own, since clicks may follow each other faster than they are answered.
            call: dict[str, Any] = {"inputs": None, "queue": False, "api_visibility": "undocumented"}
            click = {**call, "show_progress": "hidden", "trigger_mode": "multiple"}
            shelf.upload(self.drop, outputs=[shelf, status], show_progress_on=shelf, **call)
            shelf.select(self.select, outputs=[shelf, status], **click)
            next_object.click(self.next_object, outputs=[shelf, status], **click)
            remove.click(self.remove, outputs=[shelf, status], **click)
            for button, make in ((cut_out, self.cut_out), (coco, self.coco)):
                saved = button.click(make, outputs=[saver, status], **click)
                saved.then(lambda: "", outputs=saver, **click)
            choose.click(None, js=CHOOSE)
            blocks.unload(self.leave)
        return blocks

    def drop(self, event: gr.EventData, request: gr.Request) -> tuple[Any, str]:
        """Begins with a dropped photo. Where it fails, the earlier one stays."""
        began = time.monotonic()

        def begin(deadline: float) -> Work:
            data = _data(event)
            name = display_name(field(data, "name", str, "the photo's name"))
            if "file" not in data and (size := number(data, "size")) > self._settings.max_photo_bytes:
                limit = self._settings.max_photo_bytes
                raise PhotoTooLarge(f"{name!r}: expected at most {limit:,} bytes, got {size:,.0f}")
            path = _uploaded(field(data, "file", str, "the path of an uploaded file"))
            try:
                work = workbench.begin(self._service, path, name=name, deadline=deadline)
            finally:
                path.unlink(missing_ok=True)
            self._workbench.put(_key(request), work)
            return work

        work = self._outcome("drop", begin)
        if isinstance(work, FacingsError):
            return gr.skip(), _failure(work)
        across, down = work.photo.size_wh
        shelf = gr.update(value=marks(work), photo=view(work.photo), across=across, down=down)
        return shelf, _status(f"{work.name}: {len(work.standing)} boxes in {time.monotonic() - began:.1f} s")

    def select(self, event: gr.EventData, request: gr.Request) -> tuple[Any, str]:
        """A click on the photo or a rectangle over it, in photo pixels."""
        began = time.monotonic()

        def ask(work: Work, deadline: float) -> Work:
            data = _data(event)
            if "corners" in data:
                (x0, y0), (x1, y1) = (_point(corner) for corner in _pair(data["corners"]))
                return workbench.draw(self._service, work, x0, y0, x1, y1, deadline=deadline)
            x, y = _point(data.get("point"))
            is_foreground = bool(data.get("on")) and not data.get("alt")
            return workbench.click(self._service, work, x, y, is_foreground=is_foreground, deadline=deadline)

        changed = self._change("select", request, ask)
        if isinstance(changed, FacingsError):
            return gr.skip(), _failure(changed)
        before, work = changed
        if work is before:
            return gr.skip(), _status(NOTHING)
        return marks(work), _status(_size_of_objects(work, time.monotonic() - began))

    def next_object(self, request: gr.Request) -> tuple[Any, str]:
        """Puts the object in hand to the others."""
        return _shown(self._change("next", request, lambda work, _: work.next_object()))

    def remove(self, request: gr.Request) -> tuple[Any, str]:
        """Takes the object in hand off the photo's boxes."""
        return _shown(self._change("remove", request, lambda work, _: work.without_object()))

    def cut_out(self, request: gr.Request) -> tuple[Any, Any]:
        """The object in hand, as a PNG file."""
        return self._file("cutout", request, "-cutout.png", "image/png", workbench.cut_out)

    def coco(self, request: gr.Request) -> tuple[Any, Any]:
        """All boxes, as a COCO file."""
        return self._file("coco", request, ".coco.json", "application/json", workbench.coco)

    def leave(self, request: gr.Request) -> None:
        """Forgets the photo of somebody who closed the page."""
        self._workbench.release(_key(request))

    def _file(
        self, route: str, request: gr.Request, suffix: str, media_type: str, make: Callable[[Work], bytes]
    ) -> tuple[Any, Any]:
        def write(_: float) -> dict[str, str]:
            work = self._workbench.get(_key(request))
            content = base64.b64encode(make(work)).decode("ascii")
            return {"name": Path(work.name).stem[:MAX_STEM] + suffix, "type": media_type, "base64": content}

        file = self._outcome(route, write)
        if isinstance(file, FacingsError):
            return gr.skip(), _failure(file)
        return json.dumps(file), gr.skip()

    def _change(
        self, route: str, request: gr.Request, step: Callable[[Work, float], Work]
    ) -> tuple[Work, Work] | FacingsError:
        return self._outcome(
            route, lambda deadline: self._workbench.change(_key(request), lambda work: step(work, deadline))
        )

    def _outcome(self, route: str, ask: Callable[[float], Found]) -> Found | FacingsError:
        """What `ask` gives for a deadline, or its error as the person may see it; counted and logged."""
        began = time.monotonic()
        try:
            found = ask(began + self._settings.deadline_s)
        except Exception as error:
            reason = self._service.failed(error)
            status = STATUSES[reason.kind]
            log_event(
                logging.WARNING, "refused", path=f"page/{route}", status=status, kind=reason.kind, reason=str(reason)
            )
            self._service.metrics.count_request(f"page/{route}", status, time.monotonic() - began)
            return reason
        self._service.metrics.count_request(f"page/{route}", 200, time.monotonic() - began)
        return found


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _data(event: gr.EventData) -> Mapping[str, Any]:
    """What the page's script sent with an event."""
    if not isinstance(event._data, dict):
        raise RequestError(f"event: expected an object, got {json_type(event._data)}")
    return event._data


def _uploaded(text: str) -> Path:
    """The path of a file that was uploaded. Any other may be anybody's, and what is read here is deleted."""
    path = Path(os.path.realpath(text))
    if not path.is_relative_to(os.path.realpath(get_upload_folder())) or not path.is_file():
        raise RequestError("file: expected the path of an uploaded file, got another path")
    return path


def _pair(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise RequestError("expected two numbers, or two corners of two numbers")
    return value


def _point(value: Any) -> tuple[float, float]:
    x, y = _pair(value)
    return number({"x": x}, "x"), number({"y": y}, "y")


def _shown(changed: tuple[Work, Work] | FacingsError) -> tuple[Any, str]:
    if isinstance(changed, FacingsError):
        return gr.skip(), _failure(changed)
    _, work = changed
    return marks(work), _status(f"{len(work.boxes())} boxes, and no object in hand")


def _status(text: str) -> str:
    return f"<span>{html.escape(text)}</span>"


def _failure(reason: FacingsError) -> str:
    return f'<span class="failed">{html.escape(str(reason))}</span>'


def _size_of_objects(work: Work, seconds: float) -> str:
    boxes = work.objects.boxes_xyxy
    width, height = (boxes[0, 2:] - boxes[0, :2]).round().astype(int)
    what = f"1 object, {width} × {height} pixels" if len(boxes) == 1 else f"{len(boxes)} objects"
    return f"{what}, in {1000 * seconds:.0f} ms"
