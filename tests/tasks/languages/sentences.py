"""A short and a long text in each of 44 languages, written for these tests: 20 of the table, and 24 others."""

# ruff: noqa: E501

from __future__ import annotations

SENTENCES: dict[str, tuple[str, str]] = {
    # The twenty of DEFAULT_LANGUAGES.
    "ar": ("أين يمكنني أن أجد مكتبة قريبة من المحطة؟", "أحتاج إلى رسالة قصيرة أعتذر فيها لزميلي لأنني نسيت موعد الاجتماع الذي اتفقنا عليه صباح أمس، ثم أقترح عليه موعداً آخر في نهاية الأسبوع."),
    "bg": ("Къде мога да намеря библиотека близо до гарата?", "Напишете кратко писмо, в което се извинявам на колегата си, че забравих срещата ни вчера сутринта, и предлагам да се видим в края на седмицата."),
    "de": ("Wo finde ich eine Bibliothek in der Nähe des Bahnhofs?", "Schreibe einen kurzen Brief, in dem ich mich bei meiner Kollegin entschuldige, weil ich unser Treffen gestern früh vergessen habe, und schlage ihr das Wochenende vor."),
    "el": ("Πού μπορώ να βρω μια βιβλιοθήκη κοντά στον σταθμό;", "Γράψε ένα σύντομο γράμμα στο οποίο ζητώ συγγνώμη από τη συνάδελφό μου επειδή ξέχασα τη χθεσινή μας συνάντηση και προτείνω άλλη μέρα."),
    "en": ("Where can I find a library that is close to the station?", "Write a short letter in which I tell my colleague that I am sorry to have forgotten our meeting yesterday morning, and suggest the end of the week."),
    "es": ("¿Dónde puedo encontrar una biblioteca cerca de la estación?", "Escribe una carta breve en la que pido disculpas a mi compañera por haber olvidado nuestra reunión de ayer por la mañana y propongo el fin de semana."),
    "fr": ("Où puis-je trouver une bibliothèque près de la gare ?", "Écris une courte lettre dans laquelle je m'excuse auprès de ma collègue d'avoir oublié notre réunion d'hier matin et lui propose la fin de la semaine."),
    "hi": ("मुझे स्टेशन के पास पुस्तकालय कहाँ मिल सकता है?", "एक छोटा पत्र लिखिए जिसमें मैं अपने सहकर्मी से माफ़ी माँगता हूँ कि मैं कल सुबह की बैठक भूल गया था, और सप्ताह के अंत में मिलने का सुझाव देता हूँ।"),
    "it": ("Dove posso trovare una biblioteca vicino alla stazione?", "Scrivi una breve lettera in cui chiedo scusa alla mia collega perché ho dimenticato la riunione di ieri mattina e le propongo la fine della settimana."),
    "ja": ("駅の近くに図書館はどこにありますか。", "昨日の朝の打ち合わせを忘れてしまったことを同僚に謝り、週末に会うことを提案する短い手紙を書いてください。"),
    "nl": ("Waar kan ik een bibliotheek vinden die dicht bij het station ligt?", "Schrijf een korte brief waarin ik mijn collega mijn excuses aanbied omdat ik onze afspraak van gisterochtend vergeten ben, en stel het weekend voor."),
    "pl": ("Gdzie mogę znaleźć bibliotekę w pobliżu dworca?", "Napisz krótki list, w którym przepraszam koleżankę za to, że zapomniałem o naszym wczorajszym spotkaniu, i proponuję jej koniec tygodnia."),
    "pt": ("Onde posso encontrar uma biblioteca perto da estação?", "Escreva uma carta curta em que peço desculpas à minha colega por ter esquecido a nossa reunião de ontem de manhã e proponho o fim de semana."),
    "ru": ("Где я могу найти библиотеку недалеко от вокзала?", "Напишите короткое письмо, в котором я прошу прощения у коллеги за то, что забыл о нашей вчерашней встрече, и предлагаю встретиться в конце недели."),
    "sw": ("Ninaweza kupata wapi maktaba iliyo karibu na kituo cha treni?", "Andika barua fupi ambayo ninamwomba mwenzangu msamaha kwa sababu nilisahau mkutano wetu wa jana asubuhi, kisha pendekeza tukutane mwishoni mwa wiki."),
    "th": ("ฉันจะหาห้องสมุดใกล้สถานีรถไฟได้ที่ไหน", "ช่วยเขียนจดหมายสั้น ๆ เพื่อขอโทษเพื่อนร่วมงานที่ฉันลืมนัดเมื่อเช้าวานนี้ และเสนอให้เจอกันวันสุดสัปดาห์"),
    "tr": ("İstasyona yakın bir kütüphaneyi nerede bulabilirim?", "Dün sabahki toplantımızı unuttuğum için iş arkadaşımdan özür dilediğim ve hafta sonunda buluşmayı önerdiğim kısa bir mektup yaz."),
    "ur": ("مجھے اسٹیشن کے قریب لائبریری کہاں مل سکتی ہے؟", "ایک مختصر خط لکھیں جس میں میں اپنے ساتھی سے معافی مانگتا ہوں کہ میں کل صبح کی ملاقات بھول گیا تھا، اور ہفتے کے آخر میں ملنے کی تجویز دیتا ہوں۔"),
    "vi": ("Tôi có thể tìm thấy một thư viện gần nhà ga ở đâu?", "Hãy viết một bức thư ngắn trong đó tôi xin lỗi đồng nghiệp vì đã quên cuộc họp sáng hôm qua và đề nghị gặp nhau vào cuối tuần."),
    "zh": ("车站附近哪里可以找到一家图书馆呢？", "请写一封短信，向我的同事道歉，因为我昨天早上忘记了我们的会议，并建议周末再见面。"),
    # Outside of it, most of them neighbours of one above.
    "uk": ("Де я можу знайти бібліотеку поблизу вокзалу?", "Напишіть короткого листа, у якому я вибачаюся перед колегою за те, що забув про нашу вчорашню зустріч, і пропоную зустрітися наприкінці тижня."),
    "be": ("Дзе я магу знайсці бібліятэку каля вакзала?", "Напішыце кароткі ліст, у якім я прашу прабачэння ў калегі за тое, што забыўся пра нашу ўчорашнюю сустрэчу, і прапаную сустрэцца ў канцы тыдня."),
    "sr": ("Где могу да нађем библиотеку близу железничке станице?", "Напиши кратко писмо у којем се извињавам колегиници што сам заборавио наш јучерашњи састанак и предлажем јој крај недеље."),
    "mk": ("Каде можам да најдам библиотека близу до станицата?", "Напиши кратко писмо во кое ѝ се извинувам на колешката затоа што ја заборавив вчерашната средба и предлагам крај на неделата."),
    "cs": ("Kde najdu knihovnu poblíž nádraží?", "Napiš krátký dopis, ve kterém se omlouvám kolegyni za to, že jsem zapomněl na naši včerejší schůzku, a navrhuji konec týdne."),
    "sk": ("Kde nájdem knižnicu v blízkosti železničnej stanice?", "Napíš krátky list, v ktorom sa ospravedlňujem kolegyni, že som zabudol na naše včerajšie stretnutie, a navrhujem koniec týždňa."),
    "sl": ("Kje lahko najdem knjižnico blizu železniške postaje?", "Napiši kratko pismo, v katerem se opravičujem sodelavki, ker sem pozabil na najin včerajšnji sestanek, in predlagam konec tedna."),
    "hr": ("Gdje mogu pronaći knjižnicu u blizini kolodvora?", "Napiši kratko pismo u kojem se ispričavam kolegici jer sam zaboravio naš jučerašnji sastanak i predlažem joj kraj tjedna."),
    "sv": ("Var kan jag hitta ett bibliotek i närheten av stationen?", "Skriv ett kort brev där jag ber min kollega om ursäkt för att jag glömde vårt möte i går morse och föreslår slutet av veckan."),
    "da": ("Hvor kan jeg finde et bibliotek i nærheden af stationen?", "Skriv et kort brev, hvor jeg undskylder over for min kollega, fordi jeg glemte vores møde i går morges, og foreslår slutningen af ugen."),
    "nb": ("Hvor kan jeg finne et bibliotek i nærheten av stasjonen?", "Skriv et kort brev der jeg beklager overfor kollegaen min at jeg glemte møtet vårt i går morges, og foreslår slutten av uken."),
    "is": ("Hvar get ég fundið bókasafn nálægt lestarstöðinni?", "Skrifaðu stutt bréf þar sem ég bið samstarfskonu mína afsökunar á því að hafa gleymt fundinum okkar í gærmorgun."),
    "fi": ("Mistä löydän kirjaston lähellä rautatieasemaa?", "Kirjoita lyhyt kirje, jossa pyydän työtoveriltani anteeksi, että unohdin eilisaamuisen tapaamisemme, ja ehdotan viikonloppua."),
    "et": ("Kust ma leian raamatukogu jaama lähedalt?", "Kirjuta lühike kiri, milles palun kolleegilt vabandust, et unustasin meie eilse kohtumise, ja pakun välja nädala lõpu."),
    "hu": ("Hol találok könyvtárat a pályaudvar közelében?", "Írj egy rövid levelet, amelyben bocsánatot kérek a kolléganőmtől, mert elfelejtettem a tegnap reggeli megbeszélésünket."),
    "ro": ("Unde pot găsi o bibliotecă aproape de gară?", "Scrie o scrisoare scurtă în care îmi cer scuze colegei mele pentru că am uitat întâlnirea noastră de ieri dimineață și propun sfârșitul săptămânii."),
    "ca": ("On puc trobar una biblioteca a prop de l'estació?", "Escriu una carta breu en què demano disculpes a la meva companya perquè vaig oblidar la nostra reunió d'ahir al matí i li proposo el cap de setmana."),
    "id": ("Di mana saya bisa menemukan perpustakaan di dekat stasiun?", "Tulislah surat singkat yang berisi permintaan maaf kepada rekan kerja saya karena saya lupa rapat kami kemarin pagi, lalu usulkan akhir pekan."),
    "tl": ("Saan ako makakahanap ng aklatan na malapit sa istasyon?", "Sumulat ka ng maikling liham kung saan humihingi ako ng tawad sa aking katrabaho dahil nakalimutan ko ang aming pulong kahapon ng umaga."),
    "fa": ("کجا می‌توانم کتابخانه‌ای نزدیک ایستگاه پیدا کنم؟", "نامه‌ای کوتاه بنویس که در آن از همکارم عذرخواهی می‌کنم چون قرار دیروز صبح را فراموش کردم و آخر هفته را پیشنهاد می‌دهم."),
    "he": ("איפה אפשר למצוא ספרייה קרובה לתחנת הרכבת?", "כתוב מכתב קצר שבו אני מתנצל בפני עמיתתי על ששכחתי את הפגישה שלנו אתמול בבוקר, ומציע להיפגש בסוף השבוע."),
    "ko": ("기차역 근처에 있는 도서관을 어디에서 찾을 수 있나요?", "어제 아침 회의를 잊어버린 것에 대해 동료에게 사과하고 주말에 만나자고 제안하는 짧은 편지를 써 주세요."),
    "mr": ("स्थानकाजवळ ग्रंथालय कुठे मिळेल ते मला सांगा?", "एक छोटे पत्र लिहा ज्यात मी काल सकाळची आमची बैठक विसरल्याबद्दल माझ्या सहकाऱ्याची माफी मागतो आणि आठवड्याच्या शेवटी भेटण्याचे सुचवतो."),
    "az": ("Stansiyaya yaxın kitabxananı haradan tapa bilərəm?", "Dünən səhərki görüşümüzü unutduğum üçün həmkarımdan üzr istədiyim və həftənin sonunda görüşməyi təklif etdiyim qısa məktub yaz."),
}  # fmt: skip
