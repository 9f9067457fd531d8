"""The pictures of docs/: the report page and the serving page, from the demo runs and model.

    python tools/screenshots.py            # as `make screenshots` does; needs chromium and `serve`

The report is of results/runs, its pictures from the demo world; the serving page has answered two
questions about a picture of it. Each file is below 300 KB.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

import tasks
from harness import report
from harness.data.images import decode
from harness.data.sources import Source
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("demo", "demo-blind", "demo-heldout")
MOST_BYTES = 300_000
SCORES = "base=1&sort=0.descending"
ANSWERS = "task=pope&a=0&b=1&filter=better"
ONLY_ANSWERS = "<style>section:not([aria-labelledby=browser]) { display: none; }</style></head>"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--hide-scrollbars")
QUESTIONS = ("Is there a bird in the image?", "Describe the image.")
# The browser takes its picture when all is loaded: the last image comes when both are answered.
ASK = """
<img src="wait" alt="" hidden>
<script>
(async () => {
  const bytes = Uint8Array.from(atob(PICTURE), (letter) => letter.charCodeAt(0));
  show(new File([bytes], "picture.jpg", { type: "image/jpeg" }));
  while (!picture) await new Promise((done) => setTimeout(done, 50));
  for (const question of QUESTIONS) {
    at("question").value = question;
    await at("form").onsubmit(new Event("submit", { cancelable: true }));
  }
  document.activeElement.blur();
  await fetch("answered", { method: "POST" });
})();
</script>
"""


def shoot(address: str, out: Path, size: tuple[int, int]) -> None:
    """Write what Chromium shows of an address as a PNG of at most 256 colors."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise UserError("no chromium on this machine; install it to make screenshots")
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw.png"
        command = [browser, *FLAGS, f"--user-data-dir={name}/profile", f"--screenshot={raw}"]
        command += [f"--window-size={size[0]},{size[1]}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        image = Image.open(raw).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    if out.stat().st_size >= MOST_BYTES:
        raise UserError(f"{out} has {out.stat().st_size} bytes; expected less than {MOST_BYTES}")


def shoot_report(out: Path) -> None:
    """docs/report.png and docs/report-answers.png."""
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "report.html"
        runs = [str(ROOT / "results" / "runs" / run) for run in RUNS]
        if report.main([*runs, "--out", str(page)]) != 0:
            raise UserError("the report of results/runs was not made; see above")
        shoot(f"{page.as_uri()}#{SCORES}", out / "report.png", (1200, 1400))
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("</head>", ONLY_ANSWERS, 1), encoding="utf-8")
        shoot(f"{page.as_uri()}#{ANSWERS}", out / "report-answers.png", (1200, 1000))


def demo_picture() -> bytes:
    """The first picture of the demo world's POPE as a JPEG."""
    task = tasks.load("pope")
    row = Source.parse("demo", None).load(task, "paper")[0]
    file = io.BytesIO()
    decode(task.image_cells(row)[0]).convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def served() -> Iterator[str]:
    """The address of a running server whose page has a picture and asks QUESTIONS."""
    import uvicorn
    from fastapi.responses import HTMLResponse, Response

    from vlmamba import checkpoints
    from vlmamba.serving.app import create_app
    from vlmamba.serving.engine import Engine

    app = create_app(Engine(*checkpoints.load("nano")), "nano")
    picture = json.dumps(base64.b64encode(demo_picture()).decode())
    asking = ASK.replace("PICTURE", picture).replace("QUESTIONS", json.dumps(QUESTIONS))
    page = (ROOT / "vlmamba" / "serving" / "page.html").read_text(encoding="utf-8")

    @app.get("/asked", response_class=HTMLResponse)
    async def asked() -> str:
        return page.replace("</html>", f"{asking}</html>")

    done = asyncio.Event()

    @app.post("/answered", response_class=Response)
    async def answered() -> Response:
        done.set()
        return Response(status_code=204)

    @app.get("/wait", response_class=Response)
    async def wait() -> Response:
        await asyncio.wait_for(done.wait(), timeout=120)
        return Response(status_code=204)

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/asked"
    finally:
        server.should_exit = True
        thread.join()


@cli
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="default: docs/")
    args = parser.parse_args(argv)
    shoot_report(args.out)
    with served() as address:
        shoot(address, args.out / "serve.png", (1000, 400))
    for file in ("report.png", "report-answers.png", "serve.png"):
        print(f"{args.out / file}: {(args.out / file).stat().st_size / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
