"""Save Report."""

from comfy_api.latest import io, ui

from ..host.save_report import Part, as_rgb, save_parts
from ..metrics.report import FORMATS, HTML

PARTS = "abcd"


class SaveReport(io.ComfyNode):
    """Reports and charts of other nodes to one file."""

    @classmethod
    def define_schema(cls):
        reports = [io.String.Input(f"report_{p}", optional=True, force_input=True,
                                   tooltip="The 'report' of a node: text, or a table in Markdown.")
                   for p in PARTS]
        charts = [io.Image.Input(f"chart_{p}", optional=True,
                                 tooltip=f"Pictures below report_{p}; every one of a batch.")
                  for p in PARTS]
        return io.Schema(
            node_id="QuantTuneSaveReport",
            display_name="Save Report",
            category="QuantTune/measure",
            is_output_node=True,
            description="Puts reports and charts of other nodes on one page that can be kept, "
                        "printed and sent: an HTML file with everything inside, or Markdown.",
            search_aliases=["html", "markdown", "export", "document", "save text"],
            inputs=[
                io.String.Input("title", default="Quantization report",
                                tooltip="At the top of the page."),
                io.String.Input("note", multiline=True, default="",
                                tooltip="Below the title: what was tried, and why. May be "
                                        "Markdown."),
                io.String.Input("headings", multiline=True, default="",
                                tooltip="What to call the parts a to d, a line each in their "
                                        "order; an empty line for none."),
                *[entry for pair in zip(reports, charts) for entry in pair],
                io.String.Input("csv", optional=True, force_input=True,
                                tooltip="The 'csv' of a node, kept with the report for a "
                                        "spreadsheet."),
                io.String.Input("filename_prefix", default="reports/quanttune",
                                tooltip="Name of the file in the output folder; a number is "
                                        "added."),
                io.Combo.Input("format", options=list(FORMATS), default=HTML,
                               tooltip="HTML is one file that any browser opens. Markdown keeps "
                                       "the pictures in a folder beside it."),
            ],
            outputs=[io.String.Output("path", display_name="path",
                                      tooltip="Where it was written; of both, the HTML file.")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, title, note, headings, filename_prefix, format, csv=None,
                **connected) -> io.NodeOutput:
        lines = [*map(str.strip, headings.split("\n")), *[""] * len(PARTS)]
        parts = [Part(heading, connected.get(f"report_{p}"), connected.get(f"chart_{p}"))
                 for p, heading in zip(PARTS, lines)]
        workflow = (cls.hidden.extra_pnginfo or {}).get("workflow")
        path, told = save_parts(title, note, parts, csv, filename_prefix, format, workflow)
        shown = [ui.PreviewImage(as_rgb(part.images), cls=cls).as_dict() for part in parts
                 if part.images is not None and len(part.images)]
        images = {"images": [entry for one in shown for entry in one["images"]],
                  "animated": (False,)} if shown else {}
        return io.NodeOutput(path, ui={**images, **ui.PreviewText(told).as_dict()})
