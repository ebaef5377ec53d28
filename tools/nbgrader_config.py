"""Settings of an nbgrader course made from minipeft's exercises: see exercises/README.md."""

import csv

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.api import MissingEntry
from nbgrader.converters import Autograde
from nbgrader.plugins import ExportPlugin
from nbgrader.preprocessors import ClearHiddenTests, GetGrades, NbGraderPreprocessor
from nbgrader.utils import is_grade


class SkipTheEnd(NbGraderPreprocessor):
    """Cells after the last graded one, which use a real model, are not run for a grade."""

    def preprocess(self, notebook, resources):
        graded = [i for i, cell in enumerate(notebook.cells) if is_grade(cell)]
        for cell in notebook.cells[max(graded, default=0) + 1 :]:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
        return notebook, resources


class HideHiddenTests(ClearHiddenTests):
    """Feedback without hidden tests, and without what Python says where one of them fails."""

    def preprocess_cell(self, cell, resources, index):
        if not (is_grade(cell) and self._remove_hidden_test_region(cell)):
            return cell, resources
        shown = []
        for output in cell.outputs:
            if output.output_type == "error" and output.ename != "Mistake":
                output.evalue = "a hidden test fails"
                output.traceback = ["A hidden test fails. The teacher sees which."]
            if output.output_type == "error" or output.get("text", "").endswith(": right.\n"):
                shown.append(output)
        cell.outputs = shown
        return cell, resources


class GradesWithState(ExportPlugin):
    """grades.csv, which tells an empty notebook from one that was never handed in or graded."""

    def export(self, gradebook):
        with open(self.to or "grades.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["student_id", "assignment", "score", "max_score", "state"])
            for assignment in gradebook.assignments:
                for student in gradebook.students:
                    score, state = self.grade(gradebook, assignment.name, student.id)
                    table.writerow(
                        [student.id, assignment.name, score, assignment.max_score, state]
                    )

    def grade(self, gradebook, assignment, student):
        try:
            submission = gradebook.find_submission(assignment, student)
        except MissingEntry:
            return 0.0, "not handed in"
        grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
        if any(grade.auto_score is None and grade.manual_score is None for grade in grades):
            return submission.score, "not graded"
        return submission.score, "graded"


c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minipeft"

# nbgrader gives no points to a cell that writes to stderr, so a library's warning would cost some.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = "(?s).*"

# A check gives up after 30 seconds by itself, with a sentence; this is for all that is no check.
c.Execute.timeout = 120

# A check cell that somebody deleted comes back, and is graded.
c.OverwriteCells.add_missing_cells = True

c.Autograde.autograde_preprocessors = [SkipTheEnd, *Autograde.autograde_preprocessors.default()]
c.GenerateFeedback.preprocessors = [GetGrades, HideHiddenTests, CSSHTMLHeaderPreprocessor]

c.ExportApp.plugin_class = GradesWithState

# Files in the zip of Moodle (Ada Lovelace_4711_assignsubmission_file_/11_lora.ipynb) or Canvas
# (lovelaceada_4711_8_11_lora-1.ipynb): the number after the name becomes the student's id.
c.FileNameCollectorPlugin.named_regexp = (
    r"(?:.*/)?(?P<first_name>[^/]+?)(?:_LATE)?_(?P<student_id>\d+)_"
    r"(?:assignsubmission_file_?/?|\d+_)(?P<file_id>\d\d_[a-z0-9_]+?)(?:-\d+)?\.ipynb$"
)
