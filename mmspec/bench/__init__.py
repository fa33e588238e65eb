"""Measurement: our loop and drafters beside what transformers does by itself.

Each module has one entry point, a function that a command line mounts as it is::

    app.command("core")(mmspec.bench.core.run)
    app.command("text")(mmspec.bench.text.run)
    app.command("image")(mmspec.bench.image.run)
    app.command("vlm")(mmspec.bench.vlm.run)
    app.command("document")(mmspec.bench.document.run)
    app.command("video")(mmspec.bench.video.run)

and that also runs as ``python -m mmspec.bench.core --help``. All arguments have defaults; lists are
comma-separated strings, so that they read the same in Python and in a shell::

    core.run(model="tiny,smollm2,avatars", dtype="float32,bfloat16", temperature="0,1",
             batch="1,8", max_new_tokens=64, repeats=5, pairs=60, <common>)
    text.run(model="smollm2", kinds="edit,structured,code,chat", systems="generate,...",
             dtype="float32,bfloat16", temperature="0,1", batch="1,4,8", prompts=None,
             max_new_tokens=None, repeats=3, <common>)
    image.run(model="avatars", decoders="sequential,exact,...", window="8,16,32,64,128",
              guidance="1,3,5", batch="1,8", dtype="float32", temperature=1.0, prompts=8,
              quality=96, quality_generate=False, quality_guidance="3", memory=False, repeats=3,
              <common>)
    vlm.run(model="captioner", systems="generate,...", dtype="float32,bfloat16",
            temperature="0,1", batch="1,8", captions=None, series=8, max_new_tokens=None,
            schedule="adaptive", width=None, repeats=3, <common>)
    document.run(model="pages", kinds="clean,noisy,failed,tables", systems="generate,...",
                 ocr="auto", dtype="float32,bfloat16", temperature="0", batch="1,8", pages=None,
                 document=4, max_new_tokens=None, schedule="adaptive", width=None, repeats=3,
                 <common>)
    video.run(model="clips", setups="default", scorers="temporal,...", rates="0.25,0.5,0.75",
              prompts=24, calibration=24, timed=2, repeats=2, costs="measured",
              attention="dense", <common>)

with ``minutes=None, seed=0, device="cpu", out=Path("mmspec-bench"), label="", json_only=False`` in
common. ``prompts`` is a number: prompts of each kind, or captions. ``prompts=0`` measures no speed
of images, only quality and memory.

Each returns the object of its last line of output (`mmspec.bench.measure.FINAL_LINE`; ``rows`` are
told apart by ``type``), writes samples to ``<out>/<what>[_<label>].jsonl`` as they come and a
report to ``<out>/<what>[_<label>]_<hardware>_<date>.md``. It raises ``ValueError`` on wrong
arguments, and ``typer.Exit(1)`` if an output that is promised to be identical was not. A run that
is killed, or stopped by ``minutes``, goes on where it was when the same command is given again: a
sample counts while the source, the bundled files it read, the versions, the device and the number
of threads are the same.

``measure`` has the clocks, the forward counter, provenance and the store, ``tasks`` the order of
work, ``setups``, ``image_setups`` and ``vlm_setups`` the models and the same job given to both
sides, ``written`` what text, captions and pages share, ``quality`` what pictures show, ``memory``
the bytes that making them takes, ``report`` and ``image_report`` the tables. Of videos,
``video_setups`` has the models and routers, ``video_runs`` and ``video_pool`` the measurements,
``video_costs`` and ``video_statistics`` the figures, ``video_report`` and ``video_figure`` what is
shown.
"""
