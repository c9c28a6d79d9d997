"""Task descriptions of the eight reasoning tasks: five wordings each; the first is the one used at evaluation.

Several wordings keep the generator from keying on one fixed string; each says what comes in and what to answer.
"""

DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "arc_challenge": (
        "You are given a difficult science question from a school exam. Answer it with the statement that is correct.",
        "Answer hard grade-school science questions that take reasoning, not just recall.",
        "Each question tests an understanding of physics, chemistry, biology or earth science. Give the right answer.",
        "Work out what science says about the situation in the question, then state the answer that fits it best.",
        "These exam questions about nature and experiments are easy to get wrong. Reply with the correct answer.",
    ),
    "arc_easy": (
        "You are given a science question from a school exam. Answer it with the statement that is correct.",
        "Answer simple grade-school science questions.",
        "Each question asks for a basic fact about living things, matter, energy or the Earth. Give the right answer.",
        "Use everyday school science to reply to the question with its correct answer.",
        "A pupil sits a science test. For every question, write the answer that would be marked as right.",
    ),
    "openbookqa": (
        "Finish the statement or answer the question, using elementary science together with common sense.",
        "You are given the start of a sentence about how the world works. Continue it with the ending that is true.",
        "Combine a simple scientific fact with everyday knowledge to complete the text correctly.",
        "Each text leaves something open about nature or daily life. Supply the completion that makes sense.",
        "Complete the sentence so that it agrees with basic science.",
    ),
    "boolq": (
        "Read the passage and answer the question about it with yes or no.",
        "You are given a short text followed by a question. Reply yes if the text supports it, otherwise no.",
        "Decide from the passage whether the answer to the question is yes or no.",
        "Answer each question with a single word, yes or no, relying on the text above it.",
        "A reader asks something about an article. Check the article and reply only yes or no.",
    ),
    "social_iqa": (
        "A short story about people is followed by a question. Answer with what is most plausible in social life.",
        "Use your sense of how people feel and behave to answer the question about the situation.",
        "You are told what someone did. Say what they wanted, how they feel or what probably happens next.",
        "Answer questions about motives, reactions and consequences in everyday social situations.",
        "Judge the situation as a considerate person would, and reply with the likeliest answer.",
    ),
    "hellaswag": (
        "Continue the description of an activity with the ending that is most likely.",
        "You are given the beginning of a scene or a how-to text. Write what plausibly comes next.",
        "Choose the continuation that follows naturally from the events described so far.",
        "Each text breaks off in the middle of something people do. Finish it in a way that makes sense.",
        "Read the title and the first sentences, then give the sentence that would really follow.",
    ),
    "winogrande": (
        "Complete the sentence so that it refers to the right person or thing.",
        "Each sentence names two candidates. Continue it in the way that fits the one mentioned last.",
        "Use common sense to tell which of two people or objects a sentence is about, and finish it.",
        "The end of the sentence must agree with whom or what it speaks of. Write that end.",
        "Resolve who or what is meant and complete the sentence sensibly.",
    ),
    "piqa": (
        "Answer the question about how to do something with a solution that works in the physical world.",
        "You are given a practical goal. Describe the way to reach it that would actually succeed.",
        "Use knowledge of materials, tools and household objects to say how the task is done.",
        "For each goal, give the sensible method rather than one that would fail.",
        "Explain how to carry out the everyday task, relying on how objects behave.",
    ),
}
