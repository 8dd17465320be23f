"""How customers say things in English: phrasings per tool, words for values, and the talk around a request.

`{slots}` are filled by `cases`. Nothing here depends on the split.
"""

from __future__ import annotations

REQUESTS: dict[str, tuple[str, ...]] = {
    "cancel_order": (
        "cancel order {order_id}",
        "please call off order {order_id}",
        "I no longer want order {order_id}, stop it",
        "can you cancel {order_id} for me",
        "order {order_id} should be cancelled",
        "drop {order_id} before it ships",
    ),
    "track_order": (
        "where is order {order_id}",
        "track {order_id}",
        "has {order_id} shipped yet",
        "what is the status of order {order_id}",
        "when will {order_id} arrive",
        "find my parcel {order_id}",
    ),
    "refund_order": (
        "refund {amount} for order {order_id}, it {reason}",
        "I want {amount} back on {order_id} because it {reason}",
        "order {order_id} {reason}, please pay back {amount}",
        "{order_id} {reason} so give me {amount} back",
        "can I get a refund of {amount}? {order_id} {reason}",
    ),
    "change_address": (
        "send order {order_id} to zip {zip} instead",
        "the new address for {order_id} has zip {zip}",
        "I moved, ship {order_id} to {zip}",
        "change the zip of order {order_id} to {zip}",
        "{order_id} must go to {zip}, not the old address",
    ),
    "reschedule_delivery": (
        "deliver {order_id} on {date}",
        "move the delivery of {order_id} to {date}",
        "can {order_id} come on {date} instead",
        "I am only home on {date}, bring {order_id} then",
        "reschedule order {order_id} for {date}",
    ),
    "upgrade_shipping": (
        "use {speed} shipping for {order_id}",
        "switch {order_id} to {speed} delivery",
        "ship order {order_id} {speed}",
        "I would like {speed} shipping on order {order_id}",
        "can {order_id} go out with {speed} delivery",
    ),
    "change_quantity": (
        "make it {quantity} pieces in order {order_id}",
        "I need {quantity} of them in {order_id}",
        "set the quantity of {order_id} to {quantity}",
        "change {order_id} to {quantity} units",
        "order {order_id} should have {quantity} items",
    ),
    "apply_coupon": (
        "apply coupon {code} to {order_id}",
        "use code {code} on order {order_id}",
        "I forgot to enter {code} for {order_id}",
        "does {code} work on {order_id}? add it please",
        "take my voucher {code} off order {order_id}",
    ),
    "return_item": (
        "I want to return the {product} from {order_id}",
        "send back the {product} in order {order_id}",
        "how do I return a {product}? it is order {order_id}",
        "the {product} of {order_id} goes back to you",
        "start a return for {order_id}, the {product}",
    ),
    "send_invoice": (
        "send the invoice of {order_id} to {email}",
        "email the receipt for order {order_id} to {email}",
        "I need a bill for {order_id} at {email}",
        "{email} should get the invoice for {order_id}",
    ),
    "check_stock": (
        "do you have a {product} in {city}",
        "is the {product} in stock in {city}",
        "can I pick up a {product} at the {city} store",
        "does {city} still have the {product}",
        "check whether {city} has any {product} left",
    ),
    "get_price": (
        "how much is the {product}",
        "what does a {product} cost",
        "tell me the price of the {product}",
        "what would I pay for a {product}",
        "price for one {product} please",
    ),
    "store_hours": (
        "when does the {city} store open",
        "what are the opening hours in {city}",
        "how late is the shop in {city} open",
        "is {city} open on weekends",
        "until when can I visit you in {city}",
    ),
    "update_email": (
        "change my email to {email}",
        "my new address is {email}, please update it",
        "use {email} for my account from now on",
        "write to me at {email} instead of the old mail",
        "update my contact mail to {email}",
    ),
    "reset_password": (
        "reset the password for {email}",
        "I forgot my password, my login is {email}",
        "I cannot log in as {email}",
        "{email} is locked out, send a reset link",
        "send me a new password, account {email}",
    ),
    "subscribe_newsletter": (
        "sign up {email} for the {frequency} newsletter",
        "I want your {frequency} news at {email}",
        "send the {frequency} newsletter to {email}",
        "add {email} to the {frequency} mailing list",
        "subscribe {email} to the {frequency} updates",
    ),
    "close_account": (
        "close the account {email} {delete_data}",
        "shut down my account {email} {delete_data}",
        "I am leaving, close {email} {delete_data}",
        "deactivate {email} {delete_data}",
    ),
    "set_notifications": (
        "turn {enabled} {channel} notifications",
        "switch {enabled} the {channel} alerts",
        "please turn {channel} messages {enabled}",
        "I want {channel} notifications {enabled}",
    ),
    "create_ticket": (
        "open a {priority} ticket about {topic}",
        "file a {priority} complaint regarding {topic}",
        "I have a {topic} problem, {priority}",
        "log an issue with {topic}, {priority}",
        "create a ticket for {topic}, mark it {priority}",
    ),
    "book_callback": (
        "call me back on {date} at {hour}",
        "book a call for {date} at {hour}",
        "can somebody phone me at {hour} on {date}",
        "I am free on {date} at {hour} for a call",
        "schedule a callback, {date}, {hour}",
    ),
    "gift_card_balance": (
        "how much is left on gift card {card}",
        "check the balance of card {card}",
        "what is on my gift card {card}",
        "is there any money on {card}, my gift card",
    ),
    "warranty_claim": (
        "my {product} with serial {serial} stopped working, it is under warranty",
        "warranty claim for {product} {serial}",
        "the {product} broke, serial {serial}, please use the warranty",
        "file a warranty case: {product}, {serial}",
        "serial {serial}, a {product}, failed within the warranty",
    ),
    "escalate_to_human": (
        "let me talk to a human",
        "I want to speak with a real person",
        "connect me to an agent",
        "get me your manager",
        "no more bots, give me a person",
    ),
}

#: argument -> value -> ways to say it.
WORDS: dict[str, dict[object, tuple[str, ...]]] = {
    "reason": {
        "damaged": ("arrived damaged", "was broken", "came in pieces"),
        "late": ("came too late", "was late", "arrived after the party"),
        "wrong_item": ("was the wrong item", "is not what I ordered", "contained something else"),
        "unwanted": ("is not needed any more", "was a mistake", "does not please me"),
    },
    "speed": {
        "standard": ("standard", "normal", "regular"),
        "express": ("express", "faster", "priority"),
        "overnight": ("overnight", "next day"),
    },
    "frequency": {
        "daily": ("daily", "everyday"),
        "weekly": ("weekly", "every week"),
        "monthly": ("monthly", "once a month"),
    },
    "channel": {"sms": ("sms", "text message"), "email": ("email", "mail"), "push": ("push", "app")},
    "priority": {
        "low": ("low priority", "not urgent"),
        "normal": ("normal priority", "ordinary"),
        "high": ("high priority", "very urgent"),
    },
    "topic": {
        "billing": ("billing", "my bill", "a double charge"),
        "delivery": ("delivery", "the courier", "a missing parcel"),
        "website": ("the website", "your app", "the checkout page"),
        "quality": ("quality", "bad material", "poor finish"),
    },
    "enabled": {True: ("on",), False: ("off",)},
    "delete_data": {
        True: ("and delete my data", "and erase everything", "and remove all records"),
        False: ("but keep my data", "but save my history", "without deleting anything"),
    },
    "quantity": {
        n: (str(n), word)
        for n, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"), start=2)
    },
    "hour": {h: (f"{h}:00", f"{h if h < 13 else h - 12} {'am' if h < 12 else 'pm'}") for h in range(9, 19)},
}
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DATES = ("{month} {day}", "{day} {month}", "the {day} of {month}")

#: Requests that need no tool; the answer is the empty list.
CHAT = (
    "thanks, that solved it",
    "hello, are you there",
    "you have been very helpful",
    "just wanted to say hi",
    "never mind, I found it myself",
    "great service as always",
    "good morning",
    "what a nice surprise it was",
    "I am only looking around",
    "have a lovely weekend",
    "ok, that is all for now",
    "sorry, wrong chat",
    "I do not need anything today",
    "the old ticket can rest, all is fine",
)

#: Sentences around a request; `{first}`, `{last}` and `{town}` are owned by the split.
BEFORE = (
    "{first} {last} here.",
    "This is {first} from {town}.",
    "Hi, {last} speaking.",
    "I am {first} {last}, {town}.",
    "Hello from {town}, {first} here.",
    "My name is {first} {last}.",
    "Writing for {last} in {town}.",
    "{first} from {last} and sons.",
    "Mr {last} asked me to write.",
    "Customer {last}, {town} branch.",
    "My friend {first} told me you can help.",
    "Good day, {first} {last}, {town}.",
    "We met {first} at your {town} fair.",
    "On behalf of Mrs {last}:",
)
AFTER = (
    "Thanks, {first} {last}.",
    "Regards, {last}, {town}.",
    "Yours, {first} from {town}.",
    "{first} {last}, {town}",
    "Greetings from {town}, {last}",
    "Cheers, {first} {last}",
    "I will be in {town} with {first} until then.",
    "{last} will not be happy otherwise.",
    "It was for {first} in {town}.",
    "You know me, {first} from {town}.",
    "My neighbour {last} from {town} says hello.",
    "Signed, {first} {last}",
)
OPENERS = (
    "",
    "",
    "",
    "please ",
    "could you help: ",
    "hey, ",
    "quick question: ",
    "one thing: ",
    "I need help, ",
    "so, ",
)
JOINS = (" and ", ", then ", " and also ", ". Also, ", "; next, ", ". After that ", ", and ")
