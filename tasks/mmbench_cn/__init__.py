"""MMBench-CN (dev): MMBench's questions, hints and options in Chinese (Liu et al., 2023)."""

from __future__ import annotations

from tasks.common import Doc, Hub, PerProtocol, lmms_eval_functions
from tasks.mmbench import MmBench
from tasks.mmbench.prompt import lmms_question, paper_question

PAPER_INSTRUCTION = "请直接回答选项字母。"
LMMS_INSTRUCTION = "请直接使用所提供的选项字母作为答案回答。"


class MmBenchCn(MmBench):
    """MMBench in Chinese: other prompts, the same readings and metrics."""

    name = "mmbench_cn"
    size = "4,329 rows of 1,164 questions"
    paper_column = None
    table_name = "mmbench"
    demo = False
    hub = Hub("lmms-lab/MMBench", name="cn", split="dev")
    token_limits = PerProtocol(paper=1024, lmms=256)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("\n\n",))

    def prompt(self, doc: Doc, protocol: str) -> str:
        if self.prompt_choice("hint", protocol) == "none":
            doc = {**doc, "hint": None}
        if protocol == "paper":
            return paper_question(doc, PAPER_INSTRUCTION)
        return lmms_question(doc, LMMS_INSTRUCTION, nan_is_a_hint=True)


task = MmBenchCn()
globals().update(lmms_eval_functions(task))
