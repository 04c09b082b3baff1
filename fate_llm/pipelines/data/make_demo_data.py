"""Makes the demo data: customer messages of three lenders and what each lender's own desk answers.

    python -m fate_llm.pipelines.data.make_demo_data [FOLDER]

Every bank has six kinds of business that the other two lack, with desks and papers of its own: what a model
knows about one of them it can only have learned from that bank. All people, places and amounts are invented.
The same seed always makes the same bytes; a test compares them with the files in this folder.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BANKS", "Topic", "main", "make", "similarity"]

SEED = 20240607
ROWS_PER_TOPIC = 25
MOST_SIMILAR = 0.7
TRIES = 4000


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of business: what a bank answers, and ways in which customers ask."""

    answer: str
    asks: tuple[str, ...]


BANKS: Mapping[str, Mapping[str, Topic]] = {
    "bank_a": {
        "mortgage_rate": Topic(
            "Desk: Rate Lock Team.",
            (
                "can I still lock the mortgage rate you quoted for {place}",
                "my {amount} home loan offer shows a different rate than promised",
                "what happens to my quoted interest if closing slips to {month}",
                "I want to fix the rate on our house loan before it rises",
                "is the rate hold for the flat in {place} still good",
                "mortgage rates fell this week, may I get the lower one",
                "please extend the rate lock until {month}",
                "{name} and I need to know how long our mortgage rate is guaranteed",
            ),
        ),
        "escrow": Topic(
            "Desk: Escrow Services.",
            (
                "why did my escrow payment go up by {amount}",
                "the property tax for our home in {place} was not paid from escrow",
                "I got an escrow shortage letter in {month}",
                "who sends the tax money to the county, you or I",
                "my escrow account holds {amount} too much",
                "may I pay the house taxes myself and close the escrow",
                "the yearly escrow analysis looks wrong to {name}",
                "please explain the escrow line on my {month} statement",
            ),
        ),
        "refinance": Topic(
            "Desk: Refinance Center.",
            (
                "I would like to refinance our home in {place}",
                "does it pay to replace my old mortgage with a new one",
                "can we shorten the home loan to fifteen years",
                "{name} wants to take cash out of the house, about {amount}",
                "another lender offers to take over my mortgage in {month}, can you match it",
                "how do I swap my adjustable home loan for a fixed one",
                "we want to remove my former husband from the mortgage with a refinance",
                "what does refinancing {amount} cost at your bank",
            ),
        ),
        "home_insurance": Topic(
            "Desk: Hazard Claims.",
            (
                "you wrote that my home insurance has lapsed, it has not",
                "a storm damaged the roof in {place}, who gets the insurance check",
                "I changed the insurer of our house in {month}",
                "why was I billed {amount} for insurance you placed on my home",
                "the claim check for the kitchen fire names the bank too",
                "does my mortgage ask for flood cover in {place}",
                "{name} needs proof sent to the homeowner insurer",
                "my house policy was renewed, where do I send it",
            ),
        ),
        "mortgage_payoff": Topic(
            "Desk: Payoff Unit.",
            (
                "I am selling the house in {place} and need the payoff sum",
                "how much is left if I pay off the mortgage in {month}",
                "we inherited {amount} and want to clear the home loan",
                "when do I get the deed after the last mortgage payment",
                "the title company asks {name} for a payoff statement",
                "is there a fee for ending my home loan early",
                "you still show a lien although the mortgage is paid",
                "please send the final figures for closing out our house loan",
            ),
        ),
        "appraisal": Topic(
            "Desk: Valuation Office.",
            (
                "the appraisal of our house in {place} came in too low",
                "when will the appraiser visit my property",
                "I paid {amount} for a valuation and never saw it",
                "may {name} be there when the home is appraised",
                "we added a bedroom, can the value be looked at again",
                "how long does a home appraisal from {month} stay valid",
                "the valuer measured the wrong flat",
                "I want to challenge what you say my home is worth",
            ),
        ),
    },
    "bank_b": {
        "credit_line": Topic(
            "Desk: Working Capital.",
            (
                "my shop in {place} needs a larger credit line",
                "can the company draw {amount} from its line before {month}",
                "why was our business overdraft limit reduced",
                "we want a revolving credit for stock purchases",
                "when is the yearly review of our company credit line",
                "{name} took over the firm, does the credit line stay",
                "our bakery is short of cash until {month}",
                "what interest does the business line carry on {amount}",
            ),
        ),
        "card_terminal": Topic(
            "Desk: Merchant Care.",
            (
                "the card terminal in our cafe stopped working",
                "card sales from {month} did not reach the shop account",
                "I need a second card reader for my store in {place}",
                "why do you charge {amount} for the payment terminal",
                "customers cannot tap their cards at our till",
                "how do I refund a card sale at the reader",
                "{name} wants to return the terminal of the closed shop",
                "the till prints declined for every card",
            ),
        ),
        "equipment_lease": Topic(
            "Desk: Asset Leasing.",
            (
                "we want to lease a delivery van for the firm",
                "can my workshop in {place} lease a lathe worth {amount}",
                "our leased oven broke, who repairs it",
                "the machine lease ends in {month}, may we buy it",
                "how is leasing a digger taxed for a builder",
                "{name} asks to add two forklifts to our lease",
                "please quote monthly rent for printing equipment",
                "we moved the leased machines to {place}",
            ),
        ),
        "payroll": Topic(
            "Desk: Payroll Help.",
            (
                "wages of my staff were not paid out on Friday",
                "how do I set up payroll for six employees",
                "the payroll file of {month} was rejected",
                "one worker, {name}, got the salary twice",
                "can you pay our crew in {place} every two weeks",
                "I have to stop a salary run of {amount}",
                "our bookkeeper left, who can release the wages now",
                "an employee changed banks and got no pay in {month}",
            ),
        ),
        "invoice_factoring": Topic(
            "Desk: Receivables.",
            (
                "a client pays late, can you advance the invoice",
                "we want to sell unpaid invoices worth {amount}",
                "what part of a bill do you pay us at once",
                "our debtor in {place} went bankrupt, is the invoice covered",
                "{name} asks how factoring shows in our books",
                "may I leave one customer out of the factoring",
                "the advance for our {month} invoices has not arrived",
                "how fast is money paid against open bills",
            ),
        ),
        "trade_letter": Topic(
            "Desk: Trade Finance.",
            (
                "our supplier abroad wants a letter of credit",
                "the documents for the shipment to {place} have a mistake",
                "please open an import letter for {amount}",
                "can the letter of credit be extended to {month}",
                "our exporter needs a bank guarantee",
                "goods are at the port but the credit was not paid",
                "{name} needs the swift copy for our foreign seller",
                "what does it cost to confirm an export credit",
            ),
        ),
    },
    "bank_c": {
        "auto_loan": Topic(
            "Desk: Vehicle Lending.",
            (
                "I want to pay my car loan off early",
                "can I borrow {amount} for a used truck",
                "my car was totaled near {place}, what about the loan",
                "please move the due date of my auto loan to {month}",
                "I sell the car to {name}, how does the loan end",
                "the dealer says you never paid for my new car",
                "may I take the financed car abroad",
                "why is the interest on my vehicle loan so high",
            ),
        ),
        "card_dispute": Topic(
            "Desk: Chargebacks.",
            (
                "there is a charge of {amount} on my card I never made",
                "a shop in {place} billed my credit card twice",
                "I returned shoes in {month} but got no credit on my card",
                "the hotel kept charging my card after I cancelled",
                "I do not know the merchant on my card statement",
                "an online store took my money and sent nothing",
                "{name} used my card without asking, I want it back",
                "a free trial now bills my card every month",
            ),
        ),
        "lost_card": Topic(
            "Desk: Card Security.",
            (
                "I lost my bank card in {place}",
                "my purse was stolen with the debit card in it",
                "the cash machine swallowed my card",
                "please block my card at once",
                "I found the card I reported missing in {month}",
                "the new card has not come in the mail",
                "my card is gone and {name} may know the PIN",
                "I cannot find my card since the trip, please send another",
            ),
        ),
        "student_loan": Topic(
            "Desk: Campus Lending.",
            (
                "I go back to school in {month}, can my student loan wait",
                "when do I start to repay my college loan",
                "my daughter {name} needs {amount} for tuition",
                "the university in {place} did not get the loan money",
                "I finished my degree, what is my first student payment",
                "may I lower the payments on my study loan",
                "can my mother sign for my student loan",
                "I left college early, what becomes of the loan",
            ),
        ),
        "travel_notice": Topic(
            "Desk: Travel Line.",
            (
                "I fly to {place} in {month}, will my card work there",
                "please note that I will be abroad for two weeks",
                "my card was refused on holiday",
                "what do you charge when I pay in foreign money",
                "{name} and I tour by train and need card access",
                "can I take out {amount} a day while overseas",
                "I forgot to tell you about my trip to {place}",
                "do I need a second card for the journey",
            ),
        ),
        "reward_points": Topic(
            "Desk: Loyalty Club.",
            (
                "my reward points from {month} are missing",
                "how do I turn points into a flight",
                "can I give my bonus points to {name}",
                "I spent {amount} and got no points for it",
                "when do card points expire",
                "the gift I chose for my points never came",
                "does shopping in {place} earn double points",
                "I want cash back in place of points",
            ),
        ),
    },
}

_OPENERS = (
    "",
    "",
    "",
    "Hello, ",
    "Good morning, ",
    "Hi, {name} here: ",
    "Quick question: ",
    "Help please, ",
    "Dear team, ",
    "I called twice already: ",
    "Writing from {place}: ",
    "Sorry to bother you, ",
)
_CLOSERS = (
    "",
    "",
    "Thanks.",
    "What now?",
    "Who can help?",
    "Please advise.",
    "It is urgent.",
    "I need this by {month}.",
    "What do you need from me?",
    "Regards, {name}.",
    "Whom do I see?",
    "I am at work until five.",
)
_FILLERS: Mapping[str, str] = {
    "name": "Ana Ben Chloe David Elif Farid Grace Hugo Ines Jonas Kofi Lena Marta Nadia Omar Priya Rosa",
    "place": "Ashford Brookside Dover Eastport Fairview Glenwood Hillcrest Kingston Lakeview Milton Newport",
    "month": "January February March April May June July August September October November December",
    "amount": "$90 $240 $600 $1,500 $3,200 $7,000 $12,000 $25,000 $48,000 $80,000",
}
_ASKING = frozenset({"can", "could", "do", "does", "how", "is", "may", "what", "when", "where", "who", "why"})


def similarity(first: str, second: str) -> float:
    """Share of words that two texts have in common (Jaccard index), 0 to 1."""
    one, two = (set(re.findall(r"[a-z0-9$]+", text.lower())) for text in (first, second))
    return len(one & two) / len(one | two)


def _fill(text: str, draw: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: draw.choice(_FILLERS[slot.group(1)].split()), text)


def _question(ask: str, draw: random.Random) -> str:
    opener, closer = _fill(draw.choice(_OPENERS), draw), _fill(draw.choice(_CLOSERS), draw)
    body = _fill(ask, draw)
    if not opener or opener.endswith(": "):
        body = body[0].upper() + body[1:]
    asks = body.split()[0].lower() in _ASKING or re.search(r", (can|may|what|who|will|is|does|how)\b", body)
    return f"{opener}{body}{'?' if asks else '.'} {closer}".strip()


def _questions(topic: Topic, draw: random.Random) -> list[str]:
    """Different questions, every way of asking about equally often, none too similar to another."""
    found: list[str] = []
    for _ in range(TRIES):
        text = _question(topic.asks[len(found) % len(topic.asks)], draw)
        if all(similarity(text, other) < MOST_SIMILAR for other in found):
            found.append(text)
        if len(found) == ROWS_PER_TOPIC:
            return found
    raise ValueError(f"no {ROWS_PER_TOPIC} different questions for {topic.answer!r}")


def make(bank: str) -> str:
    """The JSON Lines of one bank (a key of BANKS): question, answer, category; topics mixed."""
    draw = random.Random(f"{SEED}/{bank}")
    rows = [
        {"question": question, "answer": topic.answer, "category": category}
        for category, topic in BANKS[bank].items()
        for question in _questions(topic, draw)
    ]
    draw.shuffle(rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(folder: Path) -> None:
    """Write one file per bank."""
    for bank in BANKS:
        (folder / f"{bank}.jsonl").write_text(make(bank), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
