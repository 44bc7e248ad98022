"""Talk to a base model or stage of an experiment.

    python scripts/chat.py --config configs/demo.json --model dpo
    python scripts/chat.py --config configs/demo.json --model sft --retrieval < questions.txt > answers.txt
    python scripts/chat.py --config configs/demo.json --web

The first talks in the terminal: /new starts over, Ctrl-C stops an answer, Ctrl-D or /exit ends. The second asks the lines
of a file as one conversation. The third serves a page on which two models answer the same question side by side. Answers
are greedy, as in evaluation, unless a temperature is set; evaluation.chat says who is asked in the chat template. For
research: no medical advice.
"""

import sys
from contextlib import redirect_stdout

from qilin_med.config.experiment import count, experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.evaluate.results import existing_models, model_folders


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", help="base, pretraining, sft or dpo (default: the experiment's last stage)")
    parser.add_argument("--retrieval", action="store_true", help="put passages of the index before each question")
    parser.add_argument("--max-new-tokens", type=count, default=256, help="most tokens of an answer (default 256)")
    parser.add_argument("--system", default="", help="system text before every conversation (default none)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of drawn answers; 0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability that the drawn tokens share (default 1)")
    parser.add_argument("--seed", type=int, default=42, help="of the draw of each answer (default 42)")
    parser.add_argument("--web", action="store_true", help="serve a page instead of the terminal")
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="its address (default 127.0.0.1: this machine only)")
    arguments, experiment = parse_experiment(parser)

    from qilin_med.console.quiet import quiet_libraries

    folders = model_folders(experiment)
    [(name, folder)] = existing_models(experiment, [arguments.model or list(folders)[-1]]).items()
    quiet_libraries()
    # On stdout there are answers alone.
    with redirect_stdout(sys.stderr), progress("loading libraries, model and index"):
        from qilin_med.chat.conversation import ChatModel, Manner
        from qilin_med.retrieve.retriever import Retriever

        manner = Manner(arguments.system, arguments.temperature, arguments.top_p, arguments.seed)
        retriever = Retriever(experiment) if arguments.retrieval else None
        model = None if arguments.web else ChatModel(experiment, name, folder, arguments.max_new_tokens)
    if arguments.web:
        from qilin_med.chat.page import Models, build_page, launch

        there = {name: folder for name, folder in folders.items() if folder.is_dir()}
        page = build_page(Models(experiment, there, arguments.max_new_tokens, retriever), name, manner)
        launch(page, arguments.host, arguments.port)
        print(f"http://{arguments.host}:{arguments.port} shows the page; Ctrl-C ends", flush=True)
        page.block_thread()
        return
    from qilin_med.chat.terminal import talk

    talk(model, retriever, manner)


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
