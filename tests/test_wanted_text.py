"""What the ocr reward asks for: quotations of five languages, and no apostrophes or inches."""

import pytest

from duet.configs.row import Row
from duet.rewards.wanted_text import unseen_texts, wanted_texts
from duet.train.prompts import untold_text

# the rule was made on these
PROMPTS = [
    ("a cat", []),
    ('a red card with the white word "CAT"', ["CAT"]),
    ("the baker's window and the chef's sign that says \"OPEN\"", ["OPEN"]),
    ("\"DON'T STOP\" at the dog's house", ["DON'T STOP"]),
    ('12" pizza with the word "HOT"', ["HOT"]),
    ("a 12” pizza with the word “HOT”", ["HOT"]),
    ("a poster that reads ‘Don’t panic’ in friendly letters", ["Don’t panic"]),
    ("the bakers' window, and above it 'FRESH BREAD' in gold", ["FRESH BREAD"]),
    ("a mug with 'World's Best Dad' on it", ["World's Best Dad"]),
    ("the bakers' window", []),
    ("a rock 'n' roll club", []),
    ("a '90s diner with a neon sign 'EAT'", ["EAT"]),
    ("a chalkboard: 'Soup of the day'", ["Soup of the day"]),
    ('a man 5\'10" tall beside a sign "STOP"', ["STOP"]),
    ('two doors, "IN" on the left and "OUT" on the right', ["IN", "OUT"]),
    ('a banner "SALE" over a shop, the word "SALE" in red', ["SALE", "SALE"]),
    ("a T-shirt reading \"I said 'no'\"", ["I said 'no'"]),
    ('signs that say "OPEN," "CLOSED," and "BACK SOON"', ["OPEN", "CLOSED", "BACK SOON"]),
    ('a door with "ROOM 12" and a clock', ["ROOM 12"]),
    ("'CATS' at the bakers' shop", ["CATS"]),
    ("a book 'The Dogs' War' on a table", ["The Dogs' War"]),
    ('a menu board: "12" pizza" for two', ['12" pizza']),
    ("dogs' bowls and cats' toys", []),
    ("“Hello, World!” written in the sand", ["Hello, World!"]),
    ('a sign with the text "HELLO\nWORLD"', ["HELLO\nWORLD"]),
    ("一家咖啡店的招牌上写着“早安咖啡”", ["早安咖啡"]),
    ('写着"开业大吉"的红色横幅', ["开业大吉"]),
    ("一张海报，标题是「春天」，副标题是『花开』", ["春天", "花开"]),
    ("一个人在读《红楼梦》，墙上写着“静”", ["静"]),
    ("牌子上写着‘欢迎光临’", ["欢迎光临"]),
    ("店门上写着'营业中'三个字", ["营业中"]),
    ("看板に「営業中」と書かれたラーメン屋", ["営業中"]),
    ("本の表紙に『吾輩は「猫」である』と書いてある", ["吾輩は「猫」である"]),
    ("ein Schild mit der Aufschrift „Willkommen“", ["Willkommen"]),
    ("ein Plakat, auf dem ‚Heute frei‘ steht", ["Heute frei"]),
    ("ein Buch mit dem Titel »Der Prozess« auf dem Tisch", ["Der Prozess"]),
    ("ein Schild „Geht's noch?“ an der Wand", ["Geht's noch?"]),
    ("une affiche qui dit « Vive la France »", ["Vive la France"]),
    ("un panneau «\xa0L’été\xa0» et un autre ‹\u202fFermé\u202f›", ["L’été", "Fermé"]),
    ("l'enseigne d'un café avec \"CHEZ L'AMI\"", ["CHEZ L'AMI"]),
]

# and these were written before it had seen them
UNSEEN = [
    (
        'A vintage travel poster with "VISIT MARS" across the top and "Est. 2090" below',
        ["VISIT MARS", "Est. 2090"],
    ),
    (
        "the players' locker room, a jersey with the number '23' and the name 'JORDAN'",
        ["23", "JORDAN"],
    ),
    ('a 27" monitor showing "404 Not Found", next to a 6\' tall cactus', ["404 Not Found"]),
    ("a birthday cake, 'Happy 30th, Mum!' in icing", ["Happy 30th, Mum!"]),
    ("Ol' Joe's garage, sign: ‘Joe’s Tyres’", ["Joe’s Tyres"]),
    ("graffiti \"WE WUZ HERE '99\" on the girls' school wall", ["WE WUZ HERE '99"]),
    (
        "a newspaper headline “Mayor: ‘No New Taxes’” on the kitchen table",
        ["Mayor: ‘No New Taxes’"],
    ),
    ("it's a dog's life, 'tis said; the collar reads REX", []),
    ('a label saying "100% JUICE" and a 5" knife beside it', ["100% JUICE"]),
    ('a neon sign ("BAR") in the rain', ["BAR"]),
    ('霓虹灯招牌“24小时营业”,玻璃门上贴着"推"字', ["24小时营业", "推"]),
    ("一只猫举着写有「你好，世界」的牌子，旁边的书叫《西游记》", ["你好，世界"]),
    ("黑板上写着“老师说:‘好好学习’”", ["老师说:‘好好学习’"]),
    ("Tシャツに「I ♥ 東京」とプリントされた女の子", ["I ♥ 東京"]),
    ("壁に『火の用心』、ドアに「押す」と書かれた古い家", ["火の用心", "押す"]),
    ("ein Straßenschild „Bahnhofstraße 12“ neben Omas Café", ["Bahnhofstraße 12"]),
    (
        "Werbung für 's Lädle, auf dem Fenster steht „Ausverkauf“ und darunter ‚50 %‘",
        ["Ausverkauf", "50 %"],
    ),
    ("ein Kühlschrankmagnet mit »Ich bin dann mal weg«", ["Ich bin dann mal weg"]),
    ("une pancarte « Attention à l'eau » devant l'école", ["Attention à l'eau"]),
    ("la vitrine d'une librairie qui annonce « Soldes » et “ -30 % ”", ["Soldes", "-30 %"]),
    ("‘The Bakers’ Guild’ over a door", ["The Bakers’ Guild"]),
    ("a card: 'tis the season, and a sign 'OPEN'", ["OPEN"]),
    ('a 6\'2" man, a 5\'4" woman and a "MEET HERE" sign', ["MEET HERE"]),
    ('a neon sign "BAR"; "GRILL" below', ["BAR", "GRILL"]),
    ("a sticker 'I ♥ NY' on the players' bench", ["I ♥ NY"]),
    ("ein Schild mit „Café ‚Zur Post‘“ darauf", ["Café ‚Zur Post‘"]),
    ('a monitor, 24" wide, showing "READY"', ["READY"]),
    ("书名为“三体”的书和写着“II”的腰带", ["三体", "II"]),
    ('the letters "A" "B" "C" in a row', ["A", "B", "C"]),
    ("the word 'Rock 'n' Roll' on a jacket", ["Rock 'n' Roll"]),
    ('no words, only 9" nails', []),
    ('a stray " mark, then "OPEN"', ["OPEN"]),
    ("", []),
]


@pytest.mark.parametrize(("prompt", "wanted"), PROMPTS + UNSEEN)
def test_the_texts_that_a_prompt_asks_for(prompt, wanted):
    assert wanted_texts(prompt) == wanted


@pytest.mark.parametrize("mark", "\"'“”‘’„‚«»‹›「」『』＂〝〟")
def test_a_mark_alone_quotes_nothing_and_costs_no_time(mark):
    assert wanted_texts(mark) == wanted_texts(f"a {mark}b") == []
    wanted_texts(f" {mark}a" * 1000)


def test_what_the_glyph_encoder_does_not_read_is_known():
    assert unseen_texts('the word "HOT" and « OUVERT »') == ["OUVERT"]
    assert unseen_texts("the baker's \"DON'T\"") == []
    french, english = Row({"prompt": "un panneau « OUVERT »"}), Row({"prompt": 'a "HOT" dish'})
    assert untold_text([english]) is None
    told = untold_text([english, french, french])
    assert told.startswith("2 of 3 prompts ask for text") and "'OUVERT'" in told
    assert "\n" not in told
