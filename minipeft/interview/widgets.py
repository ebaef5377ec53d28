"""A mock interview as widgets: one part at a time, a countdown, and buttons."""

import contextlib
import html
import io
import threading
import time

import ipywidgets as widgets
from IPython.display import Markdown, display

from minipeft.interview.mock import HEADINGS, MINUTES, Mock
from minipeft.refusals import shown

WORDS = {
    "en": {"left": "{} left", "over": "time is up", "back": "Back", "next": "Next",
           "reveal": "Answer", "grade": "Grade", "check": "Check", "report": "Report",
           "right": "right", "wrong": "wrong", "value": "a number",
           "no number": "{} is not a number; answer like 12.5 or 1,200."},
    "zh": {"left": "剩余 {}", "over": "时间到", "back": "上一题", "next": "下一题",
           "reveal": "看答案", "grade": "评分", "check": "检查", "report": "总结",
           "right": "正确", "wrong": "错误", "value": "一个数",
           "no number": "{} 不是一个数；请写成 12.5 或 1,200 这样。"},
}  # fmt: skip


class Countdown:
    """A label with the minutes that are left; a thread of its own moves it until `stop`."""

    def __init__(self, minutes: float, words: dict[str, str]):
        self.label, self.words = widgets.Label(), words
        self.end = time.monotonic() + 60 * minutes
        self.stopped = threading.Event()
        self.show()
        threading.Thread(target=self._run, daemon=True).start()

    def show(self) -> None:
        """Write what is left."""
        left = self.end - time.monotonic()
        clock = self.words["left"].format(f"{int(left) // 60}:{int(left) % 60:02}")
        self.label.value = clock if left > 0 else self.words["over"]

    def stop(self) -> None:
        """End the countdown."""
        self.stopped.set()

    def _run(self):
        while not self.stopped.wait(1) and time.monotonic() < self.end:
            self.show()
        self.show()


def show(interview: Mock) -> widgets.VBox:
    """The interview as a widget: its parts one after another, and a report at the end."""
    words = WORDS[interview.language]
    clock = Countdown(interview.minutes, words)
    title, body = widgets.HTML(), widgets.VBox()
    pages = [_page(interview, number, words) for number in range(1, len(interview.parts) + 1)]
    place = [0]

    def turn(step):
        place[0] = min(max(place[0] + step, 0), len(pages) - 1)
        part = interview.parts[place[0]]
        name = HEADINGS[interview.language][part.kind]
        minutes = f"{part.minutes} {MINUTES[interview.language]}"
        title.value = f"<b>{place[0] + 1} / {len(pages)}. {name}</b> ({minutes})"
        body.children = [pages[place[0]]]

    def finish(_):
        clock.stop()
        body.children = [_markdown(interview.report())]

    back, forward, end = (widgets.Button(description=words[w]) for w in ("back", "next", "report"))
    back.on_click(lambda _: turn(-1))
    forward.on_click(lambda _: turn(1))
    end.on_click(finish)
    turn(0)
    return widgets.VBox(
        [widgets.HBox([title, clock.label]), body, widgets.HBox([back, forward, end])]
    )


def _markdown(text):
    shown = widgets.Output()
    with shown:
        display(Markdown(text))
    return shown


def _page(interview, number, words):
    """The widget of one part."""
    part = interview.parts[number - 1]
    children, said = [_markdown(interview.ask(number))], widgets.HTML()
    if part.kind == "drill":
        children += _drill(interview, number, words, said)
    elif part.kind == "code":
        children += _code(interview, number, words, said)
    else:
        children += _rubric(interview, number, words, said)
    return widgets.VBox([*children, said])


def _rubric(interview, number, words, said):
    part, hidden = interview.parts[number - 1], widgets.VBox()
    boxes = [widgets.Checkbox(description=point, indent=False, layout={"width": "auto"})
             for point in part.rubric]  # fmt: skip
    reveal, grade = (widgets.Button(description=words[word]) for word in ("reveal", "grade"))

    def answer(_):
        hidden.children = [_markdown(part.solution), *boxes, grade]

    def points(_):
        share = interview.tick(number, [i for i, box in enumerate(boxes, 1) if box.value])
        said.value = f"{100 * share:.0f} %"

    reveal.on_click(answer)
    grade.on_click(points)
    return [reveal, hidden]


def _drill(interview, number, words, said):
    field, grade, steps = widgets.Text(placeholder=words["value"]), widgets.Button(), widgets.VBox()
    grade.description = words["grade"]

    def answer(_):
        try:
            right = interview.answer(number, field.value)
        except ValueError:
            said.value = words["no number"].format(html.escape(shown(field.value)))
            return
        said.value = words["right" if right else "wrong"]
        steps.children = [_markdown(interview.parts[number - 1].solution)]

    grade.on_click(answer)
    return [widgets.HBox([field, grade]), steps]


def _code(interview, number, words, said):
    task = interview.parts[number - 1].item
    editor = widgets.Textarea(task.starter, layout={"width": "100%", "height": "24em"})
    check = widgets.Button(description=words["check"])

    def run(_):
        space: dict = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                exec(f"import math\nimport torch\nfrom torch import nn\n{editor.value}", space)
                interview.code(number, *task.answer_in(space))
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        said.value = f"<pre>{html.escape(printed.getvalue())}</pre>"

    check.on_click(run)
    return [editor, check]
