"""The words of the planted bilingual world: concepts, topics, inflections, function words (data, not code).

Every concept has one Japanese form (a noun, the *masu* stem of a verb, an adjective) and one English base form, plus
the English plural, or third person and past of a verb. No surface form belongs to two concepts.
"""

from __future__ import annotations

from typing import NamedTuple

TOPICS = ("home", "farm", "dining", "school", "clinic", "sea", "mountain", "travel", "market", "stage", "park", "work")
CATEGORIES = (
    "person", "animal", "food", "drink", "place", "object", "vehicle", "nature",
    "action", "activity", "quality", "number", "time",
)  # fmt: skip
PERSON, ANIMAL, FOOD, DRINK, PLACE, OBJECT, VEHICLE, NATURE, ACTION, ACTIVITY, QUALITY, NUMBER, TIME = range(13)

# singular plural japanese counter topics...; a plural "-" marks a mass noun
_NOUNS = {
    PERSON: """
        man men 男 人 travel work mountain
        woman women 女 人 market home stage
        boy boys 少年 人 school park sea
        girl girls 少女 人 school park stage
        child children 子供 人 home park clinic
        teacher teachers 先生 人 school stage
        student students 学生 人 school travel
        doctor doctors 医者 人 clinic work
        nurse nurses 看護師 人 clinic
        farmer farmers 農夫 人 farm market mountain
        chef chefs 料理人 人 dining market
        driver drivers 運転手 人 travel work
        singer singers 歌手 人 stage dining
        fisherman fishermen 漁師 人 sea market""",
    ANIMAL: """
        dog dogs 犬 匹 home park farm
        cat cats 猫 匹 home park
        horse horses 馬 匹 farm mountain travel
        cow cows 牛 匹 farm
        pig pigs 豚 匹 farm market
        chicken chickens 鶏 匹 farm market
        bird birds 鳥 匹 park mountain sea
        monkey monkeys 猿 匹 mountain stage
        bear bears 熊 匹 mountain stage
        whale whales 鯨 匹 sea""",
    FOOD: """
        rice - 米 個 home farm dining
        bread - パン 個 home school work
        meat - 肉 個 dining market
        fish - 魚 個 sea dining market
        egg eggs 卵 個 farm home clinic
        apple apples 林檎 個 market farm clinic
        vegetable vegetables 野菜 個 farm market dining
        cake cakes ケーキ 個 home stage park
        salt - 塩 個 dining sea
        bean beans 豆 個 mountain work""",
    DRINK: """
        tea - お茶 個 home work travel
        milk - 牛乳 個 farm school clinic
        water - 水 個 clinic mountain sea park
        coffee - コーヒー 個 work dining travel
        wine - ワイン 個 dining stage market""",
    PLACE: """
        house houses 家 か所 in home
        kitchen kitchens 台所 か所 in home dining
        garden gardens 庭 か所 in home park
        farm farms 農場 か所 on farm
        village villages 村 か所 in farm mountain
        restaurant restaurants レストラン か所 in dining travel
        school schools 学校 か所 at school
        hospital hospitals 病院 か所 in clinic
        port ports 港 か所 at sea
        station stations 駅 か所 at travel
        town towns 町 か所 in travel market clinic
        market markets 市場 か所 at market
        theatre theatres 劇場 か所 in stage
        office offices 会社 か所 in work
        temple temples 寺 か所 at mountain park""",
    OBJECT: """
        book books 本 冊 school home work
        letter letters 手紙 枚 work travel
        picture pictures 絵 枚 school stage park
        map maps 地図 枚 travel mountain
        knife knives ナイフ 個 dining sea
        cup cups コップ 個 dining home clinic
        desk desks 机 台 school work
        chair chairs 椅子 個 home clinic stage
        door doors ドア 枚 home clinic
        shoe shoes 靴 個 market mountain
        piano pianos ピアノ 台 stage
        drum drums 太鼓 台 stage
        net nets 網 枚 sea farm
        box boxes 箱 個 market work farm""",
    VEHICLE: """
        car cars 車 台 work home
        train trains 電車 台 travel work
        ship ships 船 台 sea
        bicycle bicycles 自転車 台 park school
        bus buses バス 台 travel school clinic
        truck trucks トラック 台 farm market""",
    NATURE: """
        mountain mountains 山 個 mountain travel
        river rivers 川 個 mountain farm
        sea seas 海 個 sea
        tree trees 木 個 park mountain school
        flower flowers 花 個 park home clinic stage
        stone stones 石 個 work mountain
        island islands 島 個 sea travel
        cloud clouds 雲 個 sea
        star stars 星 個 stage
        leaf leaves 葉 個 dining park""",
}

# base third-person past japanese subjects(p = people only, a = animals too) objects topics...
_ACTIONS = """
    eat eats ate 食べ a food home farm dining park
    drink drinks drank 飲み a drink dining home clinic mountain
    see sees saw 見 a person,animal,nature,vehicle,place sea mountain travel park
    buy buys bought 買い p food,drink,object,vehicle market travel
    sell sells sold 売り p food,drink,object market work
    make makes made 作り p food,object work dining home
    carry carries carried 運び a food,object,drink farm sea work
    read reads read 読み p book,letter,map school travel work
    write writes wrote 書き p book,letter school clinic
    wash washes washed 洗い p object,vehicle,food dining clinic home
    find finds found 見つけ a person,animal,object,food,place mountain sea park
    use uses used 使い p object,vehicle work clinic travel
    help helps helped 助け p person,animal clinic farm sea
    teach teaches taught 教え p person school stage
    love loves loved 愛し p person,animal,nature stage park mountain
    hit hits hit 打ち p drum,piano,desk,door stage school"""
_ACTIVITIES = """
    sleep sleeps slept 眠り a home clinic farm
    run runs ran 走り a park school farm
    walk walks walked 歩き a mountain park travel
    swim swims swam 泳ぎ a sea
    sing sings sang 歌い p stage school
    dance dances danced 踊り p stage dining
    laugh laughs laughed 笑い p dining stage market
    cry cries cried 泣き a clinic home
    work works worked 働き p work farm market
    rest rests rested 休み a clinic work mountain
    wait waits waited 待ち a travel market sea"""
# english japanese linker-before-a-noun(- none) topics...
_QUALITIES = """
    big 大きい - sea farm travel
    small 小さい - home clinic school
    new 新しい - market work school
    old 古い - mountain travel home
    good 良い - dining clinic
    red 赤い - market farm park
    white 白い - clinic sea
    black 黒い - work stage
    blue 青い - sea park
    beautiful 美しい - stage mountain park
    strong 強い - work farm
    cheap 安い - market dining
    cold 冷たい - mountain sea dining
    famous 有名 な stage travel
    quiet 静か な school mountain home
    heavy 重い - work travel"""
_NUMBERS = """
    two 二 home clinic dining
    three 三 school park stage
    four 四 farm travel dining
    five 五 market sea
    six 六 work school clinic
    seven 七 mountain park stage
    eight 八 market travel farm
    nine 九 sea work mountain home"""
# english japanese kind(free adverb: tense it forces, - any; in = "in the X" / "X に") topics...
_TIMES = """
    today 今日 present market clinic work
    yesterday 昨日 past travel school clinic home
    tomorrow 明日 future travel work stage
    now 今 present home sea dining
    always いつも present school farm dining
    sometimes 時々 present park home mountain
    morning 朝 in farm school sea work
    afternoon 午後 in park clinic
    evening 夕方 in stage dining market
    spring 春 in park mountain
    summer 夏 in sea travel
    winter 冬 in mountain stage"""

TENSES = ("any", "present", "past", "future")

ENGLISH_FUNCTION = (
    "the", "a", "an", "some", "this", "that", "these", "those", "is", "are", "there", "does", "do", "did", "will",
    "not", "very", "in", "at", "on", "'s", "and", "but", "so",
)  # fmt: skip
JAPANESE_FUNCTION = (
    "は", "が", "を", "に", "で", "の", "な", "この", "その", "とても", "です", "ます", "ました", "ません", "でした",
    "か", "い", "あり", "人", "匹", "個", "台", "冊", "枚", "か所", "そして", "しかし", "だから",
)  # fmt: skip
# Only in a world with shared tokens.
SHARED_PUNCTUATION = (".", "?", "!", ",")
DIGITS = tuple("0123456789")
NAMES = ("Maria", "Ken", "Anna", "Tom", "Emi", "Paul", "Naomi", "Leo")
YEAR_WORD = "年"  # Japanese, needed only beside digits

SPECIAL = ("<pad>", "<bos>", "<eos>", "<sep>", "<unk>")


class Concept(NamedTuple):
    """One meaning and its words; `english` is (base,), (singular, plural) or (base, third person, past)."""

    name: str
    category: int
    english: tuple[str, ...]
    japanese: str
    topics: tuple[str, ...]
    mass: bool = False
    counter: str = ""
    preposition: str = ""
    linker: str = ""
    tense: str = "any"
    time_noun: bool = False
    animals_can: bool = False
    objects: tuple[str, ...] = ()  # category names or names of single concepts


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def _concepts() -> list[Concept]:
    found: list[Concept] = []
    for category, table in _NOUNS.items():
        for singular, plural, japanese, counter, *rest in _rows(table):
            preposition = rest.pop(0) if category == PLACE else ""
            mass = plural == "-"
            english = (singular,) if mass else (singular, plural)
            found.append(Concept(singular, category, english, japanese, tuple(rest), mass, counter, preposition))
    for category, table in ((ACTION, _ACTIONS), (ACTIVITY, _ACTIVITIES)):
        for base, third, past, japanese, subjects, *rest in _rows(table):
            objects = tuple(rest.pop(0).split(",")) if category == ACTION else ()
            english, can = (base, third, past), subjects == "a"
            found.append(Concept(base, category, english, japanese, tuple(rest), animals_can=can, objects=objects))
    for english, japanese, linker, *topics in _rows(_QUALITIES):
        found.append(Concept(english, QUALITY, (english,), japanese, tuple(topics), linker=linker.strip("-")))
    for english, japanese, *topics in _rows(_NUMBERS):
        found.append(Concept(english, NUMBER, (english,), japanese, tuple(topics)))
    for english, japanese, kind, *topics in _rows(_TIMES):
        noun = kind == "in"
        tense = "any" if noun else kind
        found.append(Concept(english, TIME, (english,), japanese, tuple(topics), tense=tense, time_noun=noun))
    return found


CONCEPTS: tuple[Concept, ...] = tuple(_concepts())
