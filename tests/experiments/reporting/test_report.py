import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

from regdrop.experiments import write_report
from regdrop.experiments.recording.manifest import note_command
from regdrop.experiments.recording.record import merge_records, record_path
from regdrop.experiments.reporting.report import Table, as_markdown, build_report
from regdrop.experiments.reporting.tables import example_cells


def save(folder, records):
    for one in records:
        one.save(record_path(folder, one.arm, one.seed))
    return folder


def test_report_is_made_from_records_alone(tmp_path, records):
    write_report(save(tmp_path, records))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| rdrop | 94.00 ± 2.48 (+3.00 ± 2.48) |" in text
    assert "seeds: 0, 1, 2" in text
    assert "torch 2.13.0" in text
    for axis in ("step", "minute"):
        assert f"(curves_by_{axis}.png)" in text
        assert (tmp_path / f"curves_by_{axis}.png").stat().st_size > 10_000


def test_the_report_shows_intervals_over_examples_where_records_tell(tmp_path, with_examples):
    write_report(save(tmp_path, with_examples))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    (line,) = [x for x in text.split("\n") if x.startswith("| rdrop") and " to " in x]
    assert re.search(r"\| 7\d\.\d\d to 7\d\.\d\d \(\+2\d\.\d\d to \+2\d\.\d\d\) \|", line)
    older = [replace(one, examples={}) for one in with_examples]
    assert example_cells(older)[1] == []


def test_the_report_of_merged_records_is_that_of_whole_ones(tmp_path, with_examples):
    write_report(save(tmp_path, with_examples))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[mp]*")}
    merge_records(tmp_path)
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.[mp]*")} == before
    assert set(before) == {"report.md", "curves_by_step.png", "curves_by_minute.png"}


class Page(HTMLParser):
    """Collects what a page shows, and what it would load."""

    def __init__(self):
        super().__init__()
        self.cells, self.sources, self.links, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.sources += [given["src"]] if "src" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.open += [] if tag in ("meta", "img") else [tag]
        self.cells += [""] if tag in ("td", "th") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_needs_no_other_file_and_shows_what_the_markdown_does(tmp_path, records):
    note_command(save(tmp_path, records), "compare", "regdrop compare digits --set 'a<b'")
    target = write_report(tmp_path)
    text = target.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "94.00 ± 2.48 (+3.00 ± 2.48)" in page.cells
    assert "regdrop compare digits --set &#39;a&lt;b&#39;" in text
    assert page.links == []
    assert len(page.sources) == 2
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert 'name="viewport"' in text
    assert "@media print" in text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "```bash\nregdrop compare digits --set 'a<b'\n```" in markdown


def test_markdown_shows_names_as_they_are(tmp_path, records):
    names = {"rdrop": "a|b <script>*x*</script> [l](u)\n# `c` _d_ e_f"}
    odd = [replace(r, arm=names.get(r.arm, r.arm)) for r in records]
    report = build_report(save(tmp_path, records))
    table = Table(["arm", "x|y"], [[odd[0].arm, "1"]], "a caption of <b>")
    text = as_markdown(replace(report, tables=[table], commands=["echo '```'"]))
    (row,) = [line for line in text.split("\n") if "script" in line]
    assert row == (r"| a\|b &lt;script&gt;\*x\*&lt;/script&gt; \[l\](u) # \`c\` \_d\_ e_f | 1 |")
    assert "| arm | x\\|y |" in text
    assert "a caption of &lt;b&gt;" in text
    assert "````bash\necho '```'\n````" in text
