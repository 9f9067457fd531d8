"""What pyproject.toml cannot say: the paper's table, kept beside our results, goes into the wheel.

`harness.report` and `harness.tables` show it beside what was measured (harness/reporting/paper.py).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPaper(build_py):
    """The packages, and results/paper.csv as harness/reporting/paper.csv."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a source tree reads the file where it is
            self.copy_file(
                "results/paper.csv", str(Path(self.build_lib, "harness", "reporting", "paper.csv"))
            )


setup(cmdclass={"build_py": BuildWithPaper})
